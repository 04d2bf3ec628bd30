"""Addresses from which admissions fail again and again are hung up on before they cost anything.

A token bucket per address: a failed handshake or proof takes a token, time gives them back, and
while there is none, connections from there are closed right after they are accepted. An address
from which a member got in, which may be a whole household behind one router, has a far larger one.
"""

import ipaddress
from collections import OrderedDict

CAPACITY = 4096

BURST, PER_SECOND = 20.0, 0.5
TRUSTED_BURST, TRUSTED_PER_SECOND = 400.0, 20.0
TRUSTED_FOR = 3600.0
"""Seconds after the last admission from there."""


class _Bucket:
    __slots__ = ("at", "tokens", "trusted_until")

    def __init__(self, at: float) -> None:
        self.tokens = BURST
        self.at = at
        self.trusted_until = float("-inf")


class Penalties:
    """Pure. `now` is any steadily growing number of seconds; `host` an IP address."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def allows(self, host: str, now: float) -> bool:
        """Whether a connection from `host` may try to be admitted."""
        bucket = self._buckets.get(_network(host))
        if bucket is None:
            return True
        _refill(bucket, now)
        return bucket.tokens >= 1

    def failed(self, host: str, now: float) -> None:
        """An admission that began came to nothing."""
        bucket = self._touch(host, now)
        bucket.tokens = max(0.0, bucket.tokens - 1)

    def admitted(self, host: str, now: float) -> None:
        """A member got in from there: what went wrong before is forgiven, what will be is dear."""
        bucket = self._touch(host, now)
        if bucket.trusted_until <= now:
            bucket.tokens = TRUSTED_BURST
        bucket.trusted_until = now + TRUSTED_FOR

    def _touch(self, host: str, now: float) -> _Bucket:
        network = _network(host)
        bucket = self._buckets.get(network)
        if bucket is None:
            self._make_room(now)
            bucket = self._buckets[network] = _Bucket(now)
        self._buckets.move_to_end(network)
        _refill(bucket, now)
        return bucket

    def _make_room(self, now: float) -> None:
        """Forget who was longest not heard of; members' addresses only when there is no other."""
        if len(self._buckets) < self._capacity:
            return
        strangers = (n for n, bucket in self._buckets.items() if bucket.trusted_until <= now)
        oldest = next(strangers, None) or next(iter(self._buckets))
        del self._buckets[oldest]


def _refill(bucket: _Bucket, now: float) -> None:
    trusted = now < bucket.trusted_until
    burst, rate = (TRUSTED_BURST, TRUSTED_PER_SECOND) if trusted else (BURST, PER_SECOND)
    bucket.tokens = min(burst, bucket.tokens + (now - bucket.at) * rate)
    bucket.at = now


def _network(host: str) -> str:
    """What one subscriber has: an IPv4 address, or a /64 of IPv6; a link's own addresses singly."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        return str(mapped)
    if address.version == 4 or address.is_link_local or address.is_loopback:
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))
