"""Which replica takes a request, and which the next one when that fails.

After the replica pool of kapsl-scheduler (`reference/planning.md`), with its faults mended: every
strategy skips unhealthy replicas, and sessions stay where they are when others come or go.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import msgspec

from pxd.planning.routing.rendezvous import rendezvous

ReplicaStrategy = Literal["round_robin", "least_loaded", "sticky"]

PRESSURE_TIERS = (700, 850, 950)
"""Thousandths of its KV blocks in use from which a replica is in the next worse tier."""


class PoolOverloaded(Exception):
    """No replica can take the request now."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica said of itself last. `total_blocks` 0: it gives no figures for its blocks."""

    id: str
    healthy: bool = True
    queue_depth: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    free_bytes: int = 0
    memory_bytes: int = 0
    tokens_per_s: float = 0.0
    utilisation: float = 0.0


class PoolTotals(msgspec.Struct, frozen=True):
    """A pool as one replica: sums, the mean utilisation, healthy if any replica is."""

    healthy: bool
    queue_depth: int
    free_blocks: int
    total_blocks: int
    free_bytes: int
    memory_bytes: int
    tokens_per_s: float
    utilisation: float


class ReplicaPool:
    """Chooses among the replicas it is shown, and counts what each was given.

    Replicas are always listed in an order that all nodes agree on, that of the plan: ties go to
    the first. One that is no longer listed is forgotten, its count with it.
    """

    def __init__(self) -> None:
        self._served: dict[str, int] = {}
        self._turn = 0

    @property
    def served(self) -> dict[str, int]:
        """Requests by replica: those it was selected for, and those it took over."""
        return dict(self._served)

    def attempt(
        self,
        replicas: Sequence[Replica],
        strategy: ReplicaStrategy,
        *,
        session: str | None = None,
        streaming: bool = False,
    ) -> "Attempt":
        """Select a replica for one request. Sticky without a session is round robin.

        Raises PoolOverloaded when there is no healthy replica.
        """
        self.follow(replicas)
        healthy = [replica for replica in replicas if replica.healthy]
        if not healthy:
            kind = "healthy replica" if replicas else "replica"
            raise PoolOverloaded(f"there is no {kind} in the pool")
        if strategy == "least_loaded":
            chosen = self.by_load(replicas)[0]
        elif strategy == "sticky" and session is not None:
            chosen = rendezvous(session, [replica.id for replica in healthy])
        else:
            chosen = self._in_turn(replicas)
        self.count(chosen)
        return Attempt(self, chosen, streaming=streaming)

    def follow(self, replicas: Sequence[Replica]) -> None:
        """These are the pool now."""
        self._served = {replica.id: self._served.get(replica.id, 0) for replica in replicas}

    def by_load(self, replicas: Sequence[Replica]) -> list[str]:
        """The healthy ones, the one with most room first.

        The key is KV pressure tier, queue depth, free blocks, free bytes, requests served. Where
        any gives figures for its blocks, one that gives none is taken to be in the worst tier.
        """
        healthy = [replica for replica in replicas if replica.healthy]
        unknown = len(PRESSURE_TIERS) if any(replica.total_blocks for replica in healthy) else 0

        def key(replica: Replica) -> tuple[int, int, int, int, int]:
            return (
                pressure_tier(replica) if replica.total_blocks else unknown,
                replica.queue_depth,
                -replica.free_blocks,
                -replica.free_bytes,
                self._served.get(replica.id, 0),
            )

        return [replica.id for replica in sorted(healthy, key=key)]

    def count(self, replica: str) -> None:
        """One more request served by this replica, if it is still in the pool."""
        if replica in self._served:
            self._served[replica] += 1

    def _in_turn(self, replicas: Sequence[Replica]) -> str:
        places = range(self._turn, self._turn + len(replicas))
        place = next(at % len(replicas) for at in places if replicas[at % len(replicas)].healthy)
        self._turn = place + 1
        return replicas[place].id


class Attempt:
    """One request's way through a pool. `replica` is the one to send it to now."""

    def __init__(self, pool: ReplicaPool, replica: str, *, streaming: bool) -> None:
        self.replica = replica
        self._pool = pool
        self._streaming = streaming
        self._tried = [replica]
        self._first_error: Exception | None = None

    def failed(
        self, error: Exception, replicas: Sequence[Replica], *, client_fault: bool = False
    ) -> str:
        """The replica to send the request to next: the best of those not yet tried.

        `replicas` is the pool as it is now, so that one that has died meanwhile is not tried.
        Raises what the client is to be told: `error` itself where it is the client's own fault;
        and with no replica left the first error, or PoolOverloaded for a stream.
        """
        if client_fault:
            raise error
        if self._first_error is None:
            self._first_error = error
        left = [replica for replica in replicas if replica.id not in self._tried]
        order = self._pool.by_load(left)
        if order:
            self.replica = order[0]
            self._tried.append(self.replica)
            return self.replica
        if self._streaming:
            raise PoolOverloaded("all replicas failed or overloaded") from self._first_error
        raise self._first_error

    def succeeded(self) -> None:
        """Count the request for a replica that took it over; the first was counted already."""
        if len(self._tried) > 1:
            self._pool.count(self.replica)


def pressure_tier(replica: Replica) -> int:
    """0 (plenty of KV blocks) to 3 (almost none); the replica must give figures for them."""
    return tier_of(replica.total_blocks - replica.free_blocks, replica.total_blocks)


def tier_of(used: int, total: int) -> int:
    """The same of plain numbers of blocks."""
    return bisect_right(PRESSURE_TIERS, used * 1000 // total)


def replica_in(tier: int, name: str, *, healthy: bool, queue_depth: int) -> Replica:
    """One that told its tier and not its blocks."""
    used = (0, *PRESSURE_TIERS)[tier]
    return Replica(
        id=name,
        healthy=healthy,
        queue_depth=queue_depth,
        free_blocks=1000 - used,
        total_blocks=1000,
    )


def pool_totals(replicas: Sequence[Replica]) -> PoolTotals:
    """Of all replicas, the unhealthy ones too: they still hold their memory."""
    return PoolTotals(
        healthy=any(replica.healthy for replica in replicas),
        queue_depth=sum(replica.queue_depth for replica in replicas),
        free_blocks=sum(replica.free_blocks for replica in replicas),
        total_blocks=sum(replica.total_blocks for replica in replicas),
        free_bytes=sum(replica.free_bytes for replica in replicas),
        memory_bytes=sum(replica.memory_bytes for replica in replicas),
        tokens_per_s=sum(replica.tokens_per_s for replica in replicas),
        utilisation=sum(replica.utilisation for replica in replicas) / max(1, len(replicas)),
    )
