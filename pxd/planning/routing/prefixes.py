"""Which pipeline lately served which beginning of a prompt, as far as it went through here."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

MAX_PREFIXES = 16_384
"""One takes some 200 bytes."""

LONGEST_PREFIX = 1024
"""Blocks of one request that are looked at. A request must not push out all others."""

Prefix = Sequence[bytes]
"""Names of a prompt's full blocks. Each covers all before it, as in `pxd.engine.hashing`."""


class PrefixMemory:
    """At most `limit` block names; those that were used longest ago are forgotten first."""

    def __init__(self, limit: int = MAX_PREFIXES) -> None:
        self._limit = limit
        self._homes: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def remember(self, prefix: Prefix, pipeline: str) -> None:
        """`pipeline` has computed all of `prefix`.

        Of one prefix the end is forgotten first: without its beginning it is not in a cache either.
        """
        for name in reversed(prefix[:LONGEST_PREFIX]):
            self._homes[name] = pipeline
            self._homes.move_to_end(name)
        while len(self._homes) > self._limit:
            self._homes.popitem(last=False)

    def find(self, prefix: Prefix) -> Iterator[tuple[int, str]]:
        """Lengths in blocks of known beginnings, the longest first, and who served them last."""
        for length in range(min(len(prefix), LONGEST_PREFIX), 0, -1):
            home = self._homes.get(prefix[length - 1])
            if home is not None:
                yield length, home
