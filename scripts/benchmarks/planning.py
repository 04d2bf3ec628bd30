"""What planning costs: processor seconds for clusters of up to 1,000 nodes."""

import json
import random
import time
from collections.abc import Sequence
from itertools import combinations
from typing import Annotated

import msgspec
import typer

from pxd.planning.links import Link
from pxd.planning.machines import MACHINES
from pxd.planning.model import ModelCost, NodeOffer, PlanSettings
from pxd.planning.planner import plan_cluster
from pxd.planning.result import PlanInputs, Strategy

GIB = 1 << 30
LAYERS = 128
SIZES = (10, 100, 1000)
MAX_LINKED = 100
"""Nodes up to which links between all pairs are measured."""
SITES = 5
BOUNDS_S = {10: 1.0, 100: 1.0, 1000: 5.0}
STRATEGIES: tuple[Strategy, ...] = ("greedy", "dp", "auto")
SETTINGS = PlanSettings(weight_share=0.75, kv_share=0.2)


class Timing(msgspec.Struct, frozen=True):
    """CPU seconds per strategy; `objectives` in tokens/s."""

    nodes: int
    cluster: str
    bound_s: float
    cpu_s: dict[Strategy, float]
    objectives: dict[Strategy, float]


def plan(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    most: Annotated[int, typer.Option(help="Leave out larger clusters.")] = max(SIZES),
    seed: Annotated[int, typer.Option(help="Of the clusters.")] = 1,
) -> None:
    """CPU seconds to plan 128 layers for clusters of up to 1,000 nodes."""
    timings = []
    if not as_json:
        print(_HEADER)
    for nodes in (size for size in SIZES if size <= most):
        for name, inputs in _clusters(nodes, random.Random(seed)):
            timing = _measure(nodes, name, inputs)
            timings.append(timing)
            if not as_json:
                print(_row(timing), flush=True)
    if as_json:
        print(json.dumps(msgspec.to_builtins(timings), indent=2))


def _clusters(nodes: int, rng: random.Random) -> list[tuple[str, PlanInputs]]:
    # Below a hundred nodes the model is smaller, so that it fits at all.
    model = _model(2.0 if nodes >= 100 else 0.7)
    catalogue = [rng.choice(MACHINES).offer(f"node-{place}") for place in range(nodes)]
    different = [
        NodeOffer(
            id=f"node-{place}",
            memory=int(rng.uniform(4, 140) * GIB),
            tflops=rng.uniform(5, 400),
            bandwidth=rng.uniform(80, 3000),
        )
        for place in range(nodes)
    ]
    found = [("catalogue", _inputs(model, catalogue)), ("all different", _inputs(model, different))]
    if nodes <= MAX_LINKED:
        links = _sites(different, rng)
        found.append((f"catalogue, {SITES} sites", _inputs(model, catalogue, links)))
        found.append((f"all different, {SITES} sites", _inputs(model, different, links)))
    return found


def _model(layer_gib: float) -> ModelCost:
    return ModelCost(
        layer_bytes=(int(layer_gib * GIB),) * LAYERS,
        embedding_bytes=GIB,
        head_bytes=GIB,
        tied=False,
        kv_bytes_per_token=(4096,) * LAYERS,
        splits=tuple(range(1, LAYERS)),
        attention_flops=(4 * 4096,) * LAYERS,
        hidden_size=4096,
    )


def _inputs(
    model: ModelCost, offers: Sequence[NodeOffer], links: Sequence[Link] = ()
) -> PlanInputs:
    return PlanInputs(model=model, offers=tuple(offers), settings=SETTINGS, links=tuple(links))


def _sites(offers: Sequence[NodeOffer], rng: random.Random) -> list[Link]:
    site = {offer.id: rng.randrange(SITES) for offer in offers}

    def rtt(a: str, b: str) -> float:
        away = abs(site[a] - site[b])
        return 0.02 + 0.01 * away if away else 0.0003

    return [Link(a.id, b.id, rtt(a.id, b.id), 0.1) for a, b in combinations(offers, 2)]


def _measure(nodes: int, name: str, inputs: PlanInputs) -> Timing:
    cpu_s: dict[Strategy, float] = {}
    objectives: dict[Strategy, float] = {}
    for strategy in STRATEGIES:
        started = time.process_time()
        objectives[strategy] = plan_cluster(inputs, strategy).objective
        cpu_s[strategy] = time.process_time() - started
    return Timing(nodes, name, BOUNDS_S[nodes], cpu_s, objectives)


_COLUMNS = "{:>6}  {:<22} {:>8} {:>8} {:>8} {:>8}   {:>11} {:>8}"
_HEADER = "CPU seconds for a model of 128 layers\n" + _COLUMNS.format(
    "nodes", "machines", *STRATEGIES, "bound", "auto/greedy", "auto/dp"
)


def _row(timing: Timing) -> str:
    seconds = [f"{timing.cpu_s[strategy]:.2f}" for strategy in STRATEGIES]
    auto = timing.objectives["auto"]
    ratios = [
        f"{auto / timing.objectives[classic]:.3f}" if timing.objectives[classic] else "-"
        for classic in STRATEGIES[:2]
    ]
    over = any(spent > timing.bound_s for spent in timing.cpu_s.values())
    bound = f"{timing.bound_s:.0f}" + ("  EXCEEDED" if over else "")
    return _COLUMNS.format(timing.nodes, timing.cluster, *seconds, bound, *ratios)
