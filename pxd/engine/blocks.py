"""Counting KV blocks, so that no request is admitted that the pipeline's caches cannot finish."""

BLOCK_TOKENS = 64


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """Reservations of KV blocks, `BLOCK_TOKENS` positions each, against one capacity.

    The capacity is that of the pipeline's smallest stage; every stage mirrors the same requests.
    """

    def __init__(self, capacity_tokens: int) -> None:
        self.capacity = capacity_tokens // BLOCK_TOKENS
        self._reserved: dict[int, int] = {}
        self.used = 0

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def fits_ever(self, tokens: int) -> bool:
        return blocks_for(tokens) <= self.capacity

    def reserve(self, request: int, tokens: int) -> bool:
        """Reserve for `tokens` positions; False, and nothing changed, when there is no room."""
        if request in self._reserved:
            raise ValueError(f"request {request} already holds blocks")
        blocks = blocks_for(tokens)
        if blocks > self.free:
            return False
        self._reserved[request] = blocks
        self.used += blocks
        return True

    def release(self, request: int) -> None:
        self.used -= self._reserved.pop(request)
