"""Numbers that every member may raise, such as generations of keys, and that must not run out.

They count changes, one by one. Nothing is taken whose number is greater than the milliseconds since
1970 will be in a day. So however far a member gone bad drives them, they are still good for a
change every millisecond; and as long as nobody does, no clock matters.
"""

from pxd.cluster.messages import LAST_COUNT

_AHEAD_S = 86400.0


def ceiling(now: float) -> int:
    """The greatest number that is taken at `now`, in seconds since the epoch."""
    return max(0, min(LAST_COUNT - 1, int((now + _AHEAD_S) * 1000)))
