"""Which pipeline of a model a request rides: a state machine. No clock: callers bring the times.

Of the pipelines that are in the best state, a session's own one, else the one that has the longest
beginning of the prompt in its cache, else the least loaded. Nobody waits much longer for the sake
of a cache: sessions and prefixes leave a pipeline that is clearly more loaded than another one, as
in SGLang's cache-aware router.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import msgspec
from msgspec.structs import replace

from pxd.planning.routing.breaker import Circuit, CircuitState
from pxd.planning.routing.prefixes import Prefix, PrefixMemory
from pxd.planning.routing.rendezvous import rendezvous
from pxd.planning.routing.replicas import PoolOverloaded, Replica, ReplicaPool, pressure_tier

SESSION_SLACK = 8
"""By how many requests a session's pipeline may be more loaded than another one."""

BLOCKS_PER_PLACE = 8
MAX_PREFIX_SLACK = 16
GUESS_BLOCKS = 2
GUESS_SLACK = 1
TIGHT_TIER = 2
"""The KV pressure from which a pipeline keeps no session where another one has more room."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline of the plan. `replica.queue_depth` is what its head told last, `told` names that
    word, so that a repeated one is not taken for a new one.

    `fits` says whether its KV cache can hold the request, `shaky` that one of its nodes does not
    answer just now, `retires` that the plan gives it up, and `caches` whether a request can begin
    with what another one left there.
    """

    replica: Replica
    told: tuple[int, ...] = ()
    fits: bool = True
    shaky: bool = False
    retires: bool = False
    caches: bool = True

    @property
    def id(self) -> str:
        return self.replica.id


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What a request brings along. `failures` counts its own on each pipeline so far."""

    session: str = ""
    prefix: Prefix = ()
    failures: Mapping[str, int] = MappingProxyType({})


class Router:
    """The pipelines of one model, as one ingress knows them.

    What it keeps of pipelines ends when they are no longer listed; candidates are always listed in
    the plan's order, the unhealthy ones too.
    """

    def __init__(self) -> None:
        self._pool = ReplicaPool()
        self._prefixes = PrefixMemory()
        self._circuits: dict[str, Circuit] = {}
        self._held: Counter[str] = Counter()
        self._told: dict[str, tuple[tuple[int, ...], int]] = {}

    def choose(self, candidates: Sequence[Candidate], wish: Wish, now: float) -> str:
        """The pipeline to send a request to; `ended` has to follow once it is no longer there.

        A circuit that is open, and one that failed the request more often, come after all others.
        Raises PoolOverloaded if none is healthy.
        """
        self._follow(candidates)
        best = self._best_state(candidates, wish, now)
        replicas = [replace(each.replica, queue_depth=self._depth(each)) for each in best]
        caching = {each.id for each in best if each.caches}
        chosen = (
            self._by_session(replicas, wish.session)
            or self._by_prefix(replicas, wish.prefix, caching)
            or self._pool.by_load(replicas)[0]
        )
        self._pool.count(chosen)
        self._held[chosen] += 1
        if chosen in self._circuits:
            self._circuits[chosen].taken(now)
        return chosen

    def ended(self, pipeline: str) -> None:
        """A request that was sent to `pipeline` is there no longer, for whatever reason."""
        self._held[pipeline] -= 1
        if self._held[pipeline] <= 0:
            del self._held[pipeline]

    def succeeded(self, pipeline: str, began: float) -> None:
        """A request that was sent there at `began` got a token."""
        if pipeline in self._circuits:
            self._circuits[pipeline].succeeded(began)

    def failed(self, pipeline: str, began: float, now: float) -> None:
        """A request that was sent there at `began` failed by no fault of its client."""
        self._circuits.setdefault(pipeline, Circuit()).failed(began, now)

    def remember(self, prefix: Prefix, pipeline: str) -> None:
        """`pipeline` has computed `prefix`."""
        self._prefixes.remember(prefix, pipeline)

    def circuit(self, pipeline: str, now: float) -> CircuitState:
        circuit = self._circuits.get(pipeline)
        return "closed" if circuit is None else circuit.state(now)

    def _follow(self, candidates: Sequence[Candidate]) -> None:
        self._pool.follow([each.replica for each in candidates])
        listed = {each.id for each in candidates}
        for gone in self._circuits.keys() - listed:
            del self._circuits[gone]
        told, self._told = self._told, {}
        for each in candidates:
            word = told.get(each.id)
            if word is None or word[0] != each.told:
                word = each.told, self._held[each.id]
            self._told[each.id] = word

    def _depth(self, candidate: Candidate) -> int:
        """What the head told, and what was sent there from here since."""
        held = self._held[candidate.id]
        since = max(0, held - self._told[candidate.id][1])
        return max(held, candidate.replica.queue_depth + since)

    def _best_state(
        self, candidates: Sequence[Candidate], wish: Wish, now: float
    ) -> list[Candidate]:
        """The healthy ones that share the best state."""
        states = [
            (
                not each.fits,
                self.circuit(each.id, now) == "open",
                each.shaky,
                wish.failures.get(each.id, 0),
                each.retires,
            )
            for each in candidates
        ]
        healthy = [
            (state, each)
            for state, each in zip(states, candidates, strict=True)
            if each.replica.healthy
        ]
        if not healthy:
            raise PoolOverloaded("there is no healthy pipeline")
        best = min(state for state, _ in healthy)
        return [each for state, each in healthy if state == best]

    def _by_session(self, replicas: Sequence[Replica], session: str) -> str | None:
        if not session:
            return None
        near = [name for name, more in _excess(replicas).items() if more <= SESSION_SLACK]
        return rendezvous(session, near)

    def _by_prefix(
        self, replicas: Sequence[Replica], prefix: Prefix, caching: set[str]
    ) -> str | None:
        """The longer the known beginning, the longer it is worth waiting for it.

        Where nothing is known, every ingress guesses the same one from the first blocks.
        """
        excess = {name: more for name, more in _excess(replicas).items() if name in caching}
        for length, home in self._prefixes.find(prefix):
            slack = min(max(GUESS_SLACK, length // BLOCKS_PER_PLACE), MAX_PREFIX_SLACK)
            if home in excess and excess[home] <= slack:
                return home
        near = [name for name, more in excess.items() if more <= GUESS_SLACK]
        if not prefix or not near:
            return None
        return rendezvous(prefix[min(len(prefix), GUESS_BLOCKS) - 1].hex(), near)


def _excess(replicas: Sequence[Replica]) -> dict[str, int]:
    """By how many requests each is more loaded than the least; those short of KV blocks are left
    out where others are not. Never empty."""
    tiers = {each.id: pressure_tier(each) if each.total_blocks else 0 for each in replicas}
    most = max(TIGHT_TIER - 1, min(tiers.values()))
    roomy = [each for each in replicas if tiers[each.id] <= most]
    least = min(each.queue_depth for each in roomy)
    return {each.id: each.queue_depth - least - least // 4 for each in roomy}
