"""What a head has to tell one ingress."""

from collections import OrderedDict

import trio
from msgspec.structs import replace

from pxd.wire import Output


class Outbox:
    """Outputs of at most `limit` requests. While the ingress is slow, those of one request become
    one, so that no number of tokens is too fast for it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: OrderedDict[str, Output] = OrderedDict()
        self._filled = trio.Event()
        self.closed = trio.Event()

    def put(self, output: Output) -> bool:
        """False if there is no room for it. Of one request's outputs each goes on where the one
        before it ended, and nothing follows a finish or a failure."""
        before = self._pending.get(output.request)
        if before is not None:
            output = replace(
                output,
                index=before.index,
                tokens=before.tokens + output.tokens,
                logprobs=before.logprobs + output.logprobs,
            )
        elif len(self._pending) >= self._limit:
            return False
        self._pending[output.request] = output
        self._filled.set()
        return True

    def close(self) -> None:
        """Nobody is to be told anything any more."""
        self.closed.set()
        self._pending.clear()
        self._filled.set()

    async def get(self) -> Output | None:
        """The output of the request that waits longest; None once closed."""
        while not self._pending and not self.closed.is_set():
            self._filled = trio.Event()
            await self._filled.wait()
        return None if self.closed.is_set() else self._pending.popitem(last=False)[1]
