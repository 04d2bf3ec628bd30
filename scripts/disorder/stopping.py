"""Runs that somebody may want an end of."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

ResultT = TypeVar("ResultT")


async def until_stopped(run: Callable[[], Awaitable[ResultT]]) -> ResultT | None:
    """What `run` returns; None if a signal says that it is to end before."""
    result: ResultT | None = None
    async with trio.open_nursery() as nursery:

        async def listen() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(listen)
        result = await run()
        nursery.cancel_scope.cancel()
    return result
