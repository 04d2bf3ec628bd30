"""Guessing: when a head lets requests do it, and what comes of it in a whole pipeline."""

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from pxd.serving.speculation import Costs, Speculate, Speculation
from pxd.wire import MAX_GUESSES, Step

from .harness import ArithmeticExecutor, FakeTokenizer, ServingCluster, next_token
from .test_serving import ask, prompt

CYCLE = [3, 1, 4, 1, 5, 9, 2, 6]
LENGTH = 120


def most(
    passes: Sequence[float], costs: Costs, mode: Speculate = "auto", *, possible: bool = True
) -> int:
    """What may be guessed after some passes of these lengths, and 4 that do not count."""
    speculation = Speculation(mode)
    speculation.stages_are(costs, possible=possible)
    for seconds in (*[9.0] * 4, *passes):
        speculation.passed(seconds)
        speculation.most()
    return speculation.most()


FAST = Costs(decode_s=0.004, prefill_s=0.0001)


@pytest.mark.parametrize(
    ("passes", "costs", "guesses"),
    [
        ([0.04] * 8, FAST, MAX_GUESSES),
        ([0.04] * 7, FAST, 0),
        ([0.04] * 8, Costs(prefill_s=0.001), 0),
        # A pass is mostly computing.
        ([0.0079] * 8, FAST, 0),
        ([0.0081] * 8, FAST, MAX_GUESSES),
        # Or all of it takes no time.
        ([0.0025] * 8, Costs(decode_s=0.0005), 0),
        # Guesses would compute for too long.
        ([0.04] * 8, Costs(decode_s=0.004, prefill_s=0.002), 5),
        ([0.04] * 8, Costs(decode_s=0.004), 2),
        ([0.04] * 8, Costs(decode_s=0.0201, prefill_s=0.0001), 0),
        # It goes on while links get somewhat better, and ends when they are good.
        ([0.04] * 8 + [0.007] * 16, FAST, MAX_GUESSES),
        ([0.04] * 8 + [0.0055] * 16, FAST, 0),
        ([0.04] * 8 + [0.0055] * 16 + [0.007] * 16, FAST, 0),
    ],
)
def test_guessing_pays_where_passes_wait_longer_than_they_compute(
    passes: Sequence[float], costs: Costs, guesses: int
) -> None:
    assert most(passes, costs) == guesses


def test_a_person_may_decide() -> None:
    assert most([], Costs(), "on") == MAX_GUESSES
    assert most([0.04] * 8, FAST, "off") == 0


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_stages_that_cannot_take_back_do_not_guess(mode: Speculate) -> None:
    assert most([0.04] * 8, FAST, mode, possible=False) == 0


class Repeating(ArithmeticExecutor):
    """Says the same few words for ever, whatever it is told."""

    def draw(self, values: list[float]) -> int:
        return CYCLE[len(values) % len(CYCLE)]


async def passes_of_an_answer(
    cluster: ServingCluster, names: Sequence[str], *, speculate: Speculate, delay: float
) -> int:
    """Ask twice; returns in how many passes the second answer came."""
    for node in cluster.nodes.values():
        node.executor_type = Repeating
        node.heads.speculate = speculate
        node.delay, node.pace = delay, 0.001
    await cluster.ready(cluster.publish(*names))
    head, text = cluster.nodes[names[0]], "hello"
    for _ in range(2):
        before = sum(bool(frame.rows) for _, to, frame in cluster.frames if _is_step(frame, to))
        first = len(text)
        answer = "".join(f"[{CYCLE[(first + i) % len(CYCLE)]}]" for i in range(LENGTH))
        assert await ask(head, text, LENGTH) == (answer, "length")
        for node in cluster.nodes.values():
            node.stages.publish_figures(node.heads.figures())
        await trio.sleep(10)
    after = sum(bool(frame.rows) for _, to, frame in cluster.frames if _is_step(frame, to))
    return after - before


def _is_step(frame: object, to: str) -> bool:
    return isinstance(frame, Step) and to == "b"


async def test_slow_links_are_passed_less_often(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        passes = await passes_of_an_answer(cluster, "ab", speculate="auto", delay=0.05)
    assert passes < LENGTH / 4


async def test_over_fast_links_nothing_is_guessed(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        passes = await passes_of_an_answer(cluster, "ab", speculate="auto", delay=0.0001)
    assert passes >= LENGTH


async def test_without_leave_nothing_is_guessed(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        passes = await passes_of_an_answer(cluster, "ab", speculate="off", delay=0.05)
    assert passes >= LENGTH


async def test_one_stage_that_cannot_take_back_is_enough(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        cluster.nodes["b"].trims = False
        passes = await passes_of_an_answer(cluster, "ab", speculate="on", delay=0.05)
    assert passes >= LENGTH


class Stumbling(ArithmeticExecutor):
    """Says something else now and then, which depends on all that was said before."""

    def draw(self, values: list[float]) -> int:
        total = super().draw(values)
        return total if total % 7 == 0 else CYCLE[len(values) % len(CYCLE)]


async def test_wrong_guesses_change_no_answer(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        for node in cluster.nodes.values():
            node.executor_type = Stumbling
            node.heads.speculate = "on"
        await cluster.ready(cluster.publish("a", "b"))
        known = FakeTokenizer().encode_chat(prompt("hello"))
        for _ in range(300):
            total = next_token(known, 2)
            known.append(total if total % 7 == 0 else CYCLE[len(known) % len(CYCLE)])
        said = FakeTokenizer().add(known[5:])
        assert await ask(cluster.nodes["b"], "hello", 300) == (said, "length")
        steps = [frame for _, to, frame in cluster.frames if _is_step(frame, to)]
        assert sum(frame.rows[0].draws > 1 for frame in steps if frame.rows) > 20
        # Of which many were right.
        assert sum(bool(frame.rows) for frame in steps) < 200


class Ending(ArithmeticExecutor):
    def draw(self, values: list[float]) -> int:
        return 50 if len(values) == 75 else CYCLE[len(values) % len(CYCLE)]


async def test_a_stop_string_that_begins_among_right_guesses(autojump_clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        for node in cluster.nodes.values():
            node.executor_type = Ending
            node.heads.speculate = "on"
        await cluster.ready(cluster.publish("a", "b"))
        said = FakeTokenizer().add([CYCLE[place % len(CYCLE)] for place in range(5, 73)])
        answer = await ask(cluster.nodes["a"], "hello", LENGTH, stop=("[1][4][50]",))
        assert answer == (said, "stop")
        steps = [frame for _, to, frame in cluster.frames if _is_step(frame, to)]
        assert sum(bool(frame.rows) for frame in steps) < 40
