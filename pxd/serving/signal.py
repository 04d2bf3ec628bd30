"""Waking whoever watches a piece of state, without missing a change."""

import trio


class Signal:
    """Take `event` first, then look at the state, then wait for the event: nothing is missed."""

    def __init__(self) -> None:
        self.event = trio.Event()

    def notify(self) -> None:
        self.event.set()
        self.event = trio.Event()
