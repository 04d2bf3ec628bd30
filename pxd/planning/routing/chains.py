"""Chains of hosted ranges: how many there are, which they are, and node-disjoint ones."""

from collections.abc import Iterable, Iterator

from pxd.planning.routing.cost import Hosted, RouteCost
from pxd.planning.routing.shortest import NO_PATH, Path, RouteGraph, useful_hosts

MAX_CANDIDATES = 10_000


def count_chains(hosted: Iterable[Hosted], layers: int) -> int:
    """How many chains cover [0, layers), exactly; their number can be exponential.

    Raises ValueError as `useful_hosts` does.
    """
    ways = {0: 1}
    for host in useful_hosts(hosted, layers):
        ways[host.end] = ways.get(host.end, 0) + ways[host.start]
    return ways.get(layers, 0)


def candidate_chains(
    hosted: Iterable[Hosted], layers: int, limit: int = MAX_CANDIDATES
) -> Iterator[tuple[str, ...]]:
    """Every chain over [0, layers) as node ids, in the order of their ids, at most `limit`.

    Only ranges that lead on are walked, so a chain costs no more than its length times the
    ranges that start at one layer. Raises ValueError as `useful_hosts` does.
    """
    following: dict[int, list[Hosted]] = {}
    for host in useful_hosts(hosted, layers):
        following.setdefault(host.start, []).append(host)
    chain: list[str] = []
    choices = [iter(following.get(0, ()))]
    while choices and limit > 0:
        choice = next(choices[-1], None)
        if choice is None:
            choices.pop()
            del chain[-1:]
        elif choice.end == layers:
            limit -= 1
            yield (*chain, choice.node)
        else:
            chain.append(choice.node)
            choices.append(iter(following[choice.end]))


def disjoint_chains(hosted: Iterable[Hosted], layers: int, cost: RouteCost) -> tuple[Path, ...]:
    """Pipelines that share no node: heads in order of their best cost, each its cheapest chain.

    The round robin of Parallax v0.1.2: greedy per head, so not always the most pipelines there
    could be. Ties go to the smaller id. Raises ValueError as `useful_hosts` does.
    """
    graph = RouteGraph(hosted, layers, cost)
    best = graph.cheapest(graph.heads)
    ranked = sorted(zip(best, graph.heads, strict=True), key=lambda one: (one[0].latency, one[1]))
    taken: set[str] = set()
    chains = []
    for path, head in ranked:
        free = path if taken.isdisjoint(path.nodes) else graph.cheapest([head], taken)[0]
        if free != NO_PATH:
            chains.append(free)
            taken.update(free.nodes)
    return tuple(chains)
