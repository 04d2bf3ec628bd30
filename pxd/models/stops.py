"""Finds stop strings in text that arrives in pieces."""

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first occurrence of a stop string.

    Text that may be the beginning of a stop string is held back until that is decided. Of
    occurrences that begin at different places the earliest counts. Empty stop strings are ignored.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """Return (text that is certain, whether a stop string was met). Nothing comes after it."""
        if self._stopped:
            return "", True
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        first_open = self._first_open()
        if places and min(places) <= first_open:
            certain, self._held = self._held[: min(places)], ""
            self._stopped = True
            return certain, True
        certain, self._held = self._held[:first_open], self._held[first_open:]
        return certain, False

    def finish(self) -> str:
        """The text has ended: return what was held back, up to a stop string in it."""
        held, self._held = self._held, ""
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        return held[: min(places)] if places else held

    def _first_open(self) -> int:
        """Where the earliest beginning of an unfinished stop string lies."""
        longest = max((len(stop) for stop in self._stops), default=1)
        for place in range(max(0, len(self._held) - longest + 1), len(self._held)):
            rest = self._held[place:]
            if any(len(rest) < len(stop) and stop.startswith(rest) for stop in self._stops):
                return place
        return len(self._held)
