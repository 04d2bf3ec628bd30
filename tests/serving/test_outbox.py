"""An ingress that takes its time gets all, in fewer frames."""

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from pxd.serving.outbox import Outbox
from pxd.wire import Logprobs, Output


def output(request: str, index: int, *tokens: int, scored: bool = False, **more: object) -> Output:
    logprobs = tuple(Logprobs(-float(token)) for token in tokens) if scored else ()
    return Output(request=request, index=index, tokens=tokens, logprobs=logprobs, **more)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=50))
def test_whatever_the_pace_every_token_comes_once_and_in_order(
    events: list[tuple[str, int, bool]],
) -> None:
    async def main() -> None:
        outbox = Outbox(10)
        put: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        got: dict[str, list[int]] = {"a": [], "b": [], "c": []}
        pending: set[str] = set()

        async def take() -> None:
            taken = await outbox.get()
            assert taken is not None
            assert taken.index == len(got[taken.request])
            assert [-scores.token for scores in taken.logprobs] == list(taken.tokens)
            got[taken.request] += taken.tokens
            pending.remove(taken.request)

        for request, count, reads in events:
            tokens = range(len(put[request]), len(put[request]) + count)
            assert outbox.put(output(request, len(put[request]), *tokens, scored=True))
            put[request] += tokens
            pending.add(request)
            if reads:
                await take()
        while pending:
            await take()
        assert got == put

    trio.run(main)


async def test_the_end_of_a_request_comes_with_its_last_tokens() -> None:
    outbox = Outbox(2)
    assert outbox.put(output("a", 0, 1))
    assert outbox.put(output("b", 5))
    assert outbox.put(output("a", 1, 2, finish="length"))
    assert outbox.put(output("b", 5, failure="executor-died"))
    assert await outbox.get() == output("a", 0, 1, 2, finish="length")
    assert await outbox.get() == output("b", 5, failure="executor-died")


async def test_it_is_bounded_by_requests_and_not_by_tokens() -> None:
    outbox = Outbox(2)
    assert outbox.put(output("a", 0))
    assert outbox.put(output("b", 0))
    assert not outbox.put(output("c", 0))
    assert all(outbox.put(output("a", index, index)) for index in range(1000))
    assert (await outbox.get()) == output("a", 0, *range(1000))
    assert outbox.put(output("c", 0))


@pytest.mark.parametrize("waits", [False, True])
async def test_once_closed_there_is_nothing(waits: bool, nursery: trio.Nursery) -> None:
    outbox = Outbox(2)
    results = []

    async def get() -> None:
        results.append(await outbox.get())

    if waits:
        nursery.start_soon(get)
        await trio.testing.wait_all_tasks_blocked()
    else:
        outbox.put(output("a", 0, 1))
    outbox.close()
    if not waits:
        await get()
    await trio.testing.wait_all_tasks_blocked()
    assert results == [None]
