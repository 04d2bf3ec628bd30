"""One node beside `mlx_lm.server`: time to the first token, per token, and tokens per second."""

from dataclasses import dataclass

from scripts.benchmarks import models
from scripts.benchmarks.bench import Bench, Load, compare_loads, measure, say
from scripts.benchmarks.nodes import cluster
from scripts.benchmarks.peers import mlx_server


@dataclass(frozen=True)
class Measurement:
    model: str
    load: Load
    streams: tuple[int, ...]
    rounds: int


FULL = (
    Measurement("tiny", Load(64, 64), (1, 4, 8, 16), 5),
    Measurement("100m", Load(12, 12), (1, 4, 8, 16), 3),
    Measurement("0.6b", Load(16, 8), (1,), 2),
)
QUICK = (
    Measurement("tiny", Load(32, 32), (1, 8), 3),
    Measurement("100m", Load(12, 8), (1, 8), 2),
)


def run(bench: Bench) -> None:
    for wanted in QUICK if bench.quick else FULL:
        say(f"    {wanted.model}: pxd and mlx_lm.server, {wanted.rounds} rounds")
        directory = bench.model(wanted.model)
        layers = models.SHAPES[wanted.model].layers
        place = bench.place(f"one-{wanted.model}")
        with cluster(place, directory, layers, 1) as pxd, mlx_server(directory, place) as peer:
            for streams in wanted.streams:
                key = f"one.{wanted.model}.{streams}"
                ours, theirs = measure(key, wanted.rounds, streams, wanted.load, pxd, peer)
                compare_loads(bench, key, f"{wanted.model}, {streams} at once", ours, theirs)
