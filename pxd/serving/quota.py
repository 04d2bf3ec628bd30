"""Who holds how much of something bounded."""


class Quota:
    """At most `limit` in all, and of one holder no more than what it leaves free.

    So one alone gets half of it, and whoever comes next at least half of what is left; where they
    give back and take again, all come to have the same (Choudhury and Hahne 1998). Nothing is set
    aside for those who are not there.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._held: dict[str, int] = {}

    def take(self, holder: str, amount: int) -> bool:
        """False, and nothing is taken, if that is too much."""
        held = self._held.get(holder, 0) + amount
        if held > self._free - amount:
            return False
        self._free -= amount
        self._held[holder] = held
        return True

    def give_back(self, holder: str, amount: int) -> None:
        self._free += amount
        self._held[holder] -= amount
        if not self._held[holder]:
            del self._held[holder]
