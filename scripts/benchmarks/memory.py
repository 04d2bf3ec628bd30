"""What a node takes of the machine's memory, beside `mlx_lm.server`."""

from scripts.benchmarks import models
from scripts.benchmarks.bench import Bench, prompts, say
from scripts.benchmarks.nodes import Cluster, cluster
from scripts.benchmarks.peers import mlx_server

FULL = ("tiny", "100m", "0.6b")
QUICK = ("tiny",)


def run(bench: Bench) -> None:
    for model in QUICK if bench.quick else FULL:
        say(f"    {model}: memory of 1 node, of 2, and of mlx_lm.server")
        directory, layers = bench.model(model), models.SHAPES[model].layers
        for count in (1, 2):
            with cluster(bench.place("memory"), directory, layers, count) as nodes:
                nodes.put(prompts("memory", count, 1, 8), 4)
                _report(bench, model, nodes)
        place = bench.place("memory-peer")
        place.mkdir()
        with mlx_server(directory, place) as peer:
            peer.put(prompts("memory", 0, 1, 8), 4)
            bench.figure(f"memory.{model}.peer", f"{model}, mlx_lm.server", "MiB", peer.memory())


def _report(bench: Bench, model: str, nodes: Cluster) -> None:
    count = len(nodes.nodes)
    what = f"{model}, {count} node{'s' if count > 1 else ''}, each"
    parts = [node.memory() for node in nodes.nodes]
    for name, place in (("daemon", 0), ("executor", 1)):
        key = f"memory.{model}.{count}.{name}"
        bench.figure(key, f"{what}: {name}", "MiB", *(part[place].proportional for part in parts))
        bench.figure(
            f"{key}.rss", f"{what}: {name}, RSS", "MiB", *(part[place].resident for part in parts)
        )
