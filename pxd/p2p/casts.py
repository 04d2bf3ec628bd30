"""A bounded queue for messages that may be lost: the newest matter, the oldest are dropped."""

from collections import deque
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class DroppingQueue(Generic[T]):
    """First in, first out; drops the oldest beyond `capacity` items or `max_bytes` altogether."""

    def __init__(self, capacity: int = 256, max_bytes: int = 8 << 20) -> None:
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._arrived = trio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T, size: int) -> None:
        """`size` in bytes. The newest item is kept, whatever its size."""
        self._items.append((item, size))
        self._bytes += size
        while len(self._items) > 1 and (
            len(self._items) > self._capacity or self._bytes > self._max_bytes
        ):
            self._pop()
        self._arrived.set()

    def get_nowait(self) -> T:
        """Raises IndexError when there is none."""
        return self._pop()

    async def get(self) -> T:
        """Wait for the oldest item. For one reader; cancellation loses nothing."""
        while not self._items:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self._pop()

    def clear(self) -> None:
        self._items.clear()
        self._bytes = 0

    def _pop(self) -> T:
        item, size = self._items.popleft()
        self._bytes -= size
        return item
