"""A prompt that comes back, beside one that is new: time to the first token."""

from scripts.benchmarks import models
from scripts.benchmarks.bench import Bench, Server, alternate, prompts, say
from scripts.benchmarks.nodes import cluster
from scripts.benchmarks.peers import mlx_server

MODEL = "tiny"
TOKENS = 2000
ANSWER = 2


def run(bench: Bench) -> None:
    rounds = 3 if bench.quick else 5
    say(f"    {MODEL}: a prompt of {TOKENS} tokens, twice, {rounds} rounds")
    directory, layers = bench.model(MODEL), models.SHAPES[MODEL].layers
    place = bench.place("prefix")
    with cluster(place, directory, layers, 1) as pxd, mlx_server(directory, place) as peer:
        _hits(bench, "prefix.pxd", "pxd", pxd, rounds)
        _hits(bench, "prefix.mlx", "mlx_lm.server", peer, rounds)


def _hits(bench: Bench, key: str, name: str, server: Server, rounds: int) -> None:
    def ask(number: int) -> float:
        return 1e3 * server.put(prompts(key, number, 1, TOKENS), ANSWER).ttft_s

    server.put(prompts(f"{key} warm", 0, 1, TOKENS), ANSWER)
    missed, hit = alternate(rounds, ask, ask)
    bench.compare(key, f"{name}, {TOKENS} tokens again vs new: first token", "ms", hit, missed)
