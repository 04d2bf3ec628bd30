"""Signals that end the daemon."""

import os
import signal
from collections.abc import Callable

import trio


async def stop_on_signal(stop: Callable[[bool], None]) -> None:
    """`stop` is told whether it is to be at once."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        seen = 0
        async for number in signals:
            seen += 1
            if seen > 2 and number == signal.SIGINT:
                # Executor processes see their pipe close and end by themselves.
                os._exit(130)
            stop(seen > 1)
