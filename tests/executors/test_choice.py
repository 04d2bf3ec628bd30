"""Which kind of executor a node runs, by what is installed and how fast it is."""

import sys

import pytest

from pxd.cluster.records import Device
from pxd.executors import choice
from pxd.executors.choice import best_device, choose_executor, installed_kinds
from pxd.executors.protocol import ExecutorDied, ExecutorError


def device(executor: str, kind: str = "cpu", speed: float = 1.0) -> Device:
    return Device(kind=kind, tflops=speed, bandwidth=speed, executors=(executor,))


async def best(*found: Device | Exception) -> Device:
    async def measure(kind: str) -> Device:
        one = found[int(kind)]
        if isinstance(one, Exception):
            raise one
        return one

    return await best_device([str(number) for number in range(len(found))], measure)


async def test_a_gpu_goes_before_a_cpu_and_the_faster_before_the_slower() -> None:
    slow_gpu = device("torch", "cuda", 0.1)
    assert await best(device("mlx"), slow_gpu) == slow_gpu
    assert await best(slow_gpu, device("mlx", "cuda", 0.2)) == device("mlx", "cuda", 0.2)
    assert await best(device("mlx"), device("torch", speed=2.0)) == device("torch", speed=2.0)
    assert await best(device("mlx"), device("torch")) == device("mlx")


async def test_one_that_does_not_work_is_passed_over() -> None:
    assert await best(ExecutorError("no"), device("torch")) == device("torch")
    assert await best(device("mlx"), ExecutorDied("killed")) == device("mlx")
    with pytest.raises(ExecutorError, match="0: no; 1: killed"):
        await best(ExecutorError("no"), ExecutorDied("killed"))
    with pytest.raises(ExecutorError, match="none of mlx, torch, sglang is"):
        await best()


@pytest.mark.parametrize(
    ("platform", "wanted", "measured"),
    [
        ("linux", "auto", ["mlx", "torch"]),
        ("darwin", "auto", ["mlx"]),
        ("linux", "torch", ["torch"]),
        ("darwin", "torch", ["torch"]),
    ],
)
async def test_what_is_measured(
    monkeypatch: pytest.MonkeyPatch, platform: str, wanted: str, measured: list[str]
) -> None:
    seen = []

    async def measure(*, kind: str, timeout: float) -> Device:
        seen.append(kind)
        return device(kind)

    monkeypatch.setattr(choice, "measure_device", measure)
    monkeypatch.setattr(choice, "installed_kinds", lambda: ("mlx", "torch"))
    monkeypatch.setattr(choice.sys, "platform", platform)
    found = await choose_executor(wanted)  # type: ignore[arg-type]
    assert (seen, found.executors) == (measured, (measured[0],))


async def test_one_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "installed_kinds", lambda: ("mlx",))
    with pytest.raises(ExecutorError, match=r"pip install 'pxd\[torch\]'"):
        await choose_executor("torch")


def test_one_that_this_process_keeps_out_is_installed_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = installed_kinds()
    for kind in before:
        monkeypatch.setitem(sys.modules, kind, None)
    assert before == installed_kinds() != ()
