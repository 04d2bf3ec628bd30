"""The daemon's side of a worker, against a real process with a fake engine in it."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import trio
import trio.testing

from pxd.executors import scratch
from pxd.executors.patience import Patience
from pxd.executors.process import WorkerExecutor, open_executor, worker_environment
from pxd.executors.protocol import ExecutorDied, ExecutorError, LoadSpec
from pxd.wire import Copy, Nack, Row, Sampled, SampledToken, Step, Tensor
from tests.executors.steps import run_step

WORKER = Path(__file__).with_name("fake_worker.py")
DEADLINE_S = 60


def fake_executor(**options: Any) -> WorkerExecutor:
    return WorkerExecutor(
        [sys.executable, str(WORKER)], environment=worker_environment(), **options
    )


def make_step(action: str, number: int = 0, request: int = 1) -> Step:
    return Step(
        pipeline=action,
        session=3,
        step=number,
        rows=(Row(request, 5, 2, 1),),
        tensor=Tensor("i32", (2,)),
    )


BODY = b"\x01\x00\x00\x00\x02\x00\x00\x00"
SPEC = LoadSpec(path="/fine", start=2, end=5, kv_bytes=77)


async def test_load_reports_progress_and_what_was_loaded() -> None:
    seen: list[float] = []
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            info = await executor.load(SPEC, seen.append)
    assert (info.layers, info.kv_tokens) == (3, 77)
    assert seen == [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("path", "message"), [("/refused", "no such model"), ("/crash", "IndexError: something")]
)
async def test_a_failed_load_leaves_the_worker_usable(path: str, message: str) -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            with pytest.raises(ExecutorError, match=message):
                await executor.load(LoadSpec(path=path, start=0, end=1), lambda _: None)
            assert (await executor.load(SPEC, lambda _: None)).layers == 3


async def test_copies_are_reported_besides_the_answers() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            for number in range(20):
                step = make_step("copy", number)
                step = msgspec.structs.replace(step, store=Copy(100 + number, (1,), (2,)))
                result = await run_step(executor, step, BODY)
                assert isinstance(result, Sampled)
                assert result.step == number
            events = [(await executor.copied.receive()).event for _ in range(20)]
    assert sorted(events) == list(range(100, 120))


async def test_a_coding_counts_for_the_steps_behind_it() -> None:
    answers: list[str | None] = []
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            for coding in (None, "fp8", "int8", None):
                executor.send_as(coding)
                result = await run_step(executor, make_step("coding"), BODY)
                assert isinstance(result, tuple)
                answers.append(result[0].tensor.coding)
    assert answers == [None, "fp8", "int8", None]


async def test_steps_are_answered_in_order_while_later_ones_wait() -> None:
    answers: list[int] = []
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor, trio.open_nursery() as nursery:
            await executor.load(SPEC, lambda _: None)

            async def run(number: int) -> None:
                result = await run_step(executor, make_step("echo", number, request=number), BODY)
                assert isinstance(result, Sampled)
                assert result.step == number
                assert result.session == 3
                assert result.tokens == (SampledToken(number, 7, 100 + number),)
                answers.append(number)

            for number in range(20):
                nursery.start_soon(run, number)
    assert sorted(answers) == list(range(20))


async def test_a_step_before_a_load_and_a_rejected_step_are_answered_with_a_nack() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            early = await run_step(executor, make_step("echo"), BODY)
            assert isinstance(early, Nack)
            assert early.code == "not-ready"
            await executor.load(SPEC, lambda _: None)
            rejected = await run_step(executor, make_step("reject", 4), BODY)
    assert rejected == Nack(
        pipeline="reject",
        session=3,
        step=4,
        code="unknown-request",
        reason="never heard of it",
        requests=(7,),
    )


async def test_hidden_states_come_back_with_the_step_to_forward() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            result = await run_step(executor, make_step("forward", 9), BODY)
    assert isinstance(result, tuple)
    step, body = result
    assert step == make_step("forward", 9)
    assert bytes(body) == BODY


async def test_bodies_larger_than_any_socket_buffer_pass_both_ways_at_once() -> None:
    size = 8 << 20
    step = Step(
        pipeline="forward",
        session=0,
        step=0,
        rows=(Row(1, 0, 1, 0),),
        tensor=Tensor("f32", (size // 4,)),
    )
    body = os.urandom(size)
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            results: list[bytes] = []

            async def run() -> None:
                result = await run_step(executor, step, body)
                assert isinstance(result, tuple)
                results.append(bytes(result[1]))

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(run)
    assert results == [body] * 3


async def test_a_caller_that_is_cancelled_does_not_put_later_replies_out_of_order() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            with trio.move_on_after(0.01) as scope:
                await run_step(executor, make_step("sleep:0.5", 1), BODY)
            assert scope.cancelled_caught
            result = await run_step(executor, make_step("echo", 2), BODY)
    assert isinstance(result, Sampled)
    assert result.step == 2


@pytest.mark.parametrize("end", ["crash", "stop"])
async def test_what_an_executor_had_on_disk_goes_with_it(end: str, tmp_path: Path) -> None:
    root = tmp_path / "scratch"
    directory = scratch.name_directory(root)
    executor = WorkerExecutor(
        [sys.executable, str(WORKER)],
        environment={**worker_environment(), scratch.VARIABLE: str(directory)},
        directory=directory,
    )
    found: list[Path] = []

    def interrupt(_: float) -> None:
        found.extend(directory.iterdir())
        if end == "crash":
            os.kill(executor.pid, signal.SIGKILL)
        else:
            scope.cancel()

    with trio.fail_after(DEADLINE_S):
        with trio.CancelScope() as scope:
            async with executor:
                with pytest.raises(ExecutorDied, match="SIGKILL"):
                    await executor.load(LoadSpec(path="/litter", start=0, end=1), interrupt)
    assert found == [directory / "view"]
    assert scope.cancelled_caught == (end == "stop")
    assert not list(root.iterdir())


async def test_kill_while_busy_reaches_all_waiters() -> None:
    deaths: list[str] = []
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)

            async def wait(number: int) -> None:
                with pytest.raises(ExecutorDied) as caught:
                    await run_step(executor, make_step("sleep:600", number), BODY)
                deaths.append(str(caught.value))

            async with trio.open_nursery() as nursery:
                for number in range(3):
                    nursery.start_soon(wait, number)
                await trio.testing.wait_all_tasks_blocked()
                os.kill(executor.pid, signal.SIGKILL)
            with pytest.raises(ExecutorDied):
                await executor.memory()
    assert len(deaths) == 3
    assert all("SIGKILL" in death for death in deaths)


async def test_kill_while_idle_is_noticed_without_asking() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            os.kill(executor.pid, signal.SIGKILL)
            assert "SIGKILL" in await executor.wait_died()


async def test_an_exit_is_explained_by_code_and_last_output() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            with pytest.raises(ExecutorDied, match=r"exit code 3.*about to leave"):
                await run_step(executor, make_step("exit:3"), BODY)


async def test_a_worker_that_hangs_is_killed() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor(reply_timeout=1.0) as executor:
            with pytest.raises(ExecutorDied, match="no answer for 1 s"):
                await executor.load(LoadSpec(path="/slow", start=0, end=1), lambda _: None)


async def test_a_step_that_takes_far_longer_than_others_is_a_hang() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor(patience=Patience(least=0.5)) as executor:
            await executor.load(SPEC, lambda _: None)
            await run_step(executor, make_step("echo"), BODY)
            with pytest.raises(ExecutorDied, match=r"no answer for 0\.5 s"):
                await run_step(executor, make_step("sleep:600"), BODY)
            assert executor.hung


async def test_a_step_that_takes_long_for_the_first_time_is_none() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor(patience=Patience(least=0.1)) as executor:
            await executor.load(SPEC, lambda _: None)
            assert isinstance(await run_step(executor, make_step("sleep:2"), BODY), Sampled)
            assert isinstance(await run_step(executor, make_step("sleep:2"), BODY), Sampled)
            assert not executor.hung


async def test_a_refused_step_says_nothing_of_how_long_steps_take() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor(patience=Patience(least=0.1)) as executor:
            await executor.load(SPEC, lambda _: None)
            assert isinstance(await run_step(executor, make_step("starve"), BODY), Nack)
            assert isinstance(await run_step(executor, make_step("sleep:2"), BODY), Sampled)


async def test_a_step_without_memory_leaves_the_worker_usable() -> None:
    with trio.fail_after(DEADLINE_S):
        async with fake_executor() as executor:
            await executor.load(SPEC, lambda _: None)
            starved = await run_step(executor, make_step("starve"), BODY)
            assert isinstance(starved, Nack)
            assert (starved.code, starved.requests) == ("out-of-memory", (1,))
            assert isinstance(await run_step(executor, make_step("echo"), BODY), Sampled)


async def test_leaving_the_context_ends_the_process_even_in_a_long_step() -> None:
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            async with fake_executor() as executor:
                await executor.load(SPEC, lambda _: None)

                async def wait() -> None:
                    with pytest.raises(ExecutorDied, match="stopped"):
                        await run_step(executor, make_step("sleep:600"), BODY)

                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
            assert not psutil.pid_exists(executor.pid)
            await executor.aclose()


async def test_cancellation_leaves_no_process() -> None:
    with trio.fail_after(DEADLINE_S):
        with trio.CancelScope() as scope:
            async with fake_executor() as executor:
                await executor.load(SPEC, lambda _: None)
                scope.cancel()
                await run_step(executor, make_step("sleep:600"), BODY)
        assert scope.cancelled_caught
    assert not psutil.pid_exists(executor.pid)


async def test_what_the_body_raises_comes_out_as_it_is() -> None:
    with trio.fail_after(DEADLINE_S):
        with pytest.raises(KeyError):
            async with fake_executor():
                raise KeyError("mine")


async def test_a_process_that_cannot_be_started_counts_as_dead() -> None:
    with pytest.raises(ExecutorDied, match="could not be started"):
        async with WorkerExecutor(["/no/such/program"]):
            pytest.fail("there is no such program")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ExecutorError, match="no executor kind 'abacus'"):
        open_executor("abacus")


DAEMON = """
import sys, trio, trio.testing
from tests.executors.steps import run_step
from tests.executors.test_process import SPEC, BODY, fake_executor, make_step

async def main():
    async with fake_executor() as executor:
        await executor.load(SPEC, lambda _: None)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_step, executor, make_step({action!r}), BODY)
            await trio.testing.wait_all_tasks_blocked()
            print(executor.pid, flush=True)
            await trio.sleep_forever()

trio.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("action", ["sleep:600", "echo"])
def test_the_worker_dies_with_its_daemon(action: str) -> None:
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON.format(action=action)],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        worker = psutil.Process(int(daemon.stdout.readline()))
        daemon.kill()
        worker.wait(timeout=DEADLINE_S)
    assert not worker.is_running()
