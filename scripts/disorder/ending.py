"""How runs end before their time."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from scripts.benchmarks.errors import BenchError

FoundT = TypeVar("FoundT")


async def until_told(run: Callable[[], Awaitable[FoundT]]) -> FoundT | None:
    """What `run` returns; None if somebody wants an end before that."""
    result: FoundT | None = None
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        result = await run()
        nursery.cancel_scope.cancel()
    return result


def messages(group: BaseExceptionGroup[BenchError]) -> list[str]:
    """For people, of all that went wrong."""
    found = []
    for error in group.exceptions:
        found += messages(error) if isinstance(error, BaseExceptionGroup) else [str(error)]
    return found
