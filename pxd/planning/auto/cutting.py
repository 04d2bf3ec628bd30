"""Where to cut the model for nodes in a given order.

Dynamic programming over (stage, cut), for many orders of equally many nodes at once. For each
number of requests the slowest stage is made as fast as it can be, and among such cuts the whole
way as short as it can be; where the way round is longer than what the slowest stage takes for all
micro-batches, the slowest stage is then given as much time as shortens the way.
"""

from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from pxd.planning.auto.estimate import Score, loads, score
from pxd.planning.auto.orders import Order
from pxd.planning.auto.problem import Bools, Problem
from pxd.planning.auto.work import Floats

Load = tuple[int, int, int]

_SLACK = 1 + 1e-9
_HALVINGS = 5
_PATIENCE = (1.1, 1.25, 1.5, 2.0, 4.0)
"""How much longer than it must the slowest stage may take, to shorten the way of a pipeline that
breaks the latency bound."""
_RUNNERS_UP, _FINALISTS = 2, 4
"""Orders that are looked at closely, and those where a pipeline breaks the latency bound."""
_ELEMENTS = 1 << 20
"""Of one array in a batch of orders; bounds memory."""


class Cut(msgspec.Struct, frozen=True):
    """Stages on the nodes of `order` that end at the cuts `ends`."""

    order: Order
    ends: tuple[int, ...]
    score: Score

    @property
    def stages(self) -> Iterator[tuple[int, int, int]]:
        """(node, from cut, to cut) of each stage."""
        return zip(self.order, (0, *self.ends[:-1]), self.ends, strict=True)

    @property
    def value(self) -> float:
        return self.score.value


def best_cut(problem: Problem, orders: Sequence[Order]) -> Cut | None:
    """The best of all orders, which must be equally long; None if no cut fits any of them.

    Among equals the first order wins.
    """
    return best_cuts(problem, [orders])[0]


def best_cuts(
    problem: Problem, choices: Sequence[Sequence[Order]], *, thorough: bool = False
) -> list[Cut | None]:
    """`best_cut` of each choice of orders. All orders of all choices must be equally long.

    With `thorough` more is tried for pipelines that break the latency bound, at several times the
    cost.
    """
    found: list[Cut | None] = [None] * len(choices)
    orders = [order for choice in choices for order in choice]
    owners = np.array([place for place, choice in enumerate(choices) for _ in choice])
    if not orders or len(orders[0]) > problem.last:
        return found
    batch = max(1, _ELEMENTS // len(problem.cuts) ** 2)
    patience = _PATIENCE if thorough else ()
    picks: list[dict[Order, tuple[float, Load]]] = [{} for _ in choices]
    for place in range(0, len(orders), batch):
        some = orders[place : place + batch]
        for load, value in _first_estimates(problem, some, patience):
            for index in range(len(some)):
                seen = picks[owners[place + index]]
                if value[index] > seen.get(some[index], (0.0, load))[0] * _SLACK:
                    seen[some[index]] = float(value[index]), load
    for owner, seen in enumerate(picks):
        ranked = sorted(seen, key=lambda order: -seen[order][0])
        for place, order in enumerate(ranked[: _FINALISTS if thorough else _RUNNERS_UP]):
            held = found[owner]
            # Estimates are exact enough to tell more orders apart but for the latency bound.
            late = held is None or held.score.token_s > problem.workload.token_limit_s
            if place >= _RUNNERS_UP and not late:
                break
            # Halving comes to the same cuts again and again.
            for ends in dict.fromkeys(_refined(problem, order, seen[order][1], patience)):
                scored = score(problem, order, ends)
                held = found[owner]
                if held is None or scored.value > held.value * _SLACK:
                    found[owner] = Cut(order, ends, scored)
    return found


def _first_estimates(
    problem: Problem, orders: Sequence[Order], patience: Sequence[float]
) -> Iterator[tuple[Load, Floats]]:
    """For ever fewer requests, the value of each order as far as it is easily told; 0 for none."""
    hops = np.array([sum(problem.hops(order)) for order in orders])
    possible = np.isfinite(_Steps(problem, orders, 1, 1).least_slowest())
    before = np.zeros(len(orders))
    for load in loads(len(orders[0]), problem.workload.max_requests):
        requests, waves, size = load
        steps = _Steps(problem, orders, size, requests)
        least, alone = steps.least_slowest(), _alone(problem, orders, size)
        value = np.zeros(len(orders))
        for longer in (_SLACK, *patience):
            slowest = least * longer
            way = steps.least_way(slowest)
            with np.errstate(invalid="ignore"):
                speed = requests / np.maximum(waves * slowest, way + hops)
                lateness = (way * alone + hops) / problem.workload.token_limit_s
                found = speed / np.maximum(1.0, lateness) ** 2
            value = np.maximum(value, np.where(np.isfinite(way), found, 0.0))
            if not (np.isfinite(way) & (lateness > 1)).any():
                break
        yield load, value
        if ((value > 0) & (value <= before) | ~possible).all():
            break
        before = np.maximum(before, value)


def _alone(problem: Problem, orders: Sequence[Order], batch: int) -> Floats:
    """Per order: about how much of a batch's time one request alone takes."""
    one, several = problem.decode(1)[0][:, -1], problem.decode(batch)[0][:, -1]
    share = one / several
    return np.array([share[[problem.kinds[node] for node in order]].mean() for order in orders])


def _refined(
    problem: Problem, order: Order, load: Load, patience: Sequence[float]
) -> Iterator[tuple[int, ...]]:
    requests, waves, size = load
    hops = sum(problem.hops(order))
    steps = _Steps(problem, [order], size, requests)
    low = float(steps.least_slowest()[0])
    ends = steps.shortest_way(low * _SLACK)
    yield ends
    way = steps.way(ends)
    if waves * low < way + hops:
        high = (way + hops) / waves
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            ends = steps.shortest_way(middle)
            yield ends
            if waves * middle < steps.way(ends) + hops:
                low = middle
            else:
                high = middle
        yield steps.shortest_way(high)
    if way + hops > problem.workload.token_limit_s:
        for longer in patience:
            yield steps.shortest_way(low * longer)
        alone = _Steps(problem, [order], 1, 1)
        yield alone.shortest_way(float("inf"))


class _Steps:
    """Seconds of every possible stage, per order and place in it: (order, from cut, to cut)."""

    def __init__(
        self, problem: Problem, orders: Sequence[Order], batch: int, requests: int
    ) -> None:
        sums, beside = problem.decode(batch)
        kinds = np.array([[problem.kinds[node] for node in order] for order in orders])
        need = problem.request_bytes
        needed = (need[None, :] - need[:, None]) * requests
        self._count = len(orders)
        self._cuts = len(problem.cuts)
        self.seconds: list[Floats] = []
        for place in range(kinds.shape[1]):
            distinct, back = np.unique(kinds[:, place], return_inverse=True)
            took = sums[distinct][:, None, :] - sums[distinct][:, :, None]
            took += beside[distinct][:, None, None]
            fits: Bools = problem.fits[distinct]
            if requests > 1:
                fits = fits & (needed <= problem.kv_rooms[distinct][:, None, None])
            took[~fits] = np.inf
            self.seconds.append(took if len(distinct) == 1 else took[back])

    def least_slowest(self) -> Floats:
        """Per order: seconds of the slowest stage, as few as they can be."""
        reached = np.full((self._count, self._cuts), np.inf)
        reached[:, 0] = 0.0
        for took in self.seconds:
            reached = np.maximum(reached[:, :, None], took).min(axis=1)
        return reached[:, -1]

    def least_way(self, limit: Floats) -> Floats:
        """Per order: seconds of all stages together, with none above its `limit`."""
        reached = np.full((self._count, self._cuts), np.inf)
        reached[:, 0] = 0.0
        for took in self.seconds:
            allowed = np.where(took <= limit[:, None, None], took, np.inf)
            reached = (reached[:, :, None] + allowed).min(axis=1)
        return reached[:, -1]

    def shortest_way(self, limit: float) -> tuple[int, ...]:
        """The cuts of `least_way`, for the one order there is."""
        reached = np.full(self._cuts, np.inf)
        reached[0] = 0.0
        back = []
        for took in self.seconds:
            allowed = np.where(took[0] <= limit, took[0], np.inf)
            way = reached[:, None] + allowed
            back.append(way.argmin(axis=0))
            reached = way.min(axis=0)
        ends, end = [], self._cuts - 1
        for came_from in reversed(back):
            ends.append(end)
            end = int(came_from[end])
        return tuple(reversed(ends))

    def way(self, ends: Sequence[int]) -> float:
        starts = [0, *ends[:-1]]
        return sum(
            float(took[0, start, end])
            for took, start, end in zip(self.seconds, starts, ends, strict=True)
        )
