"""Two and three nodes beside one, and beside `mlx.launch`'s pipeline over MLX's ring."""

import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from scripts.benchmarks import models
from scripts.benchmarks.bench import (
    Bench,
    Load,
    Server,
    alternate,
    compare_loads,
    measure,
    prompts,
    say,
)
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.nodes import Cluster, cluster
from scripts.benchmarks.peers import Peer, mlx_launch

FORWARD_TIMEOUT_S = 300.0
LONGER = 3
"""How much longer answers are where streams are compared: beginning and end are no steady state."""


def run(bench: Bench) -> None:
    if bench.quick:
        _compare_splits(bench, "tiny", (1, 2), Load(32, 32), rounds=3)
        _compare_splits(bench, "100m", (2,), Load(8, 8), rounds=2)
    else:
        _compare_splits(bench, "tiny", (1, 2, 3), Load(32, 64), rounds=5)
        _compare_splits(bench, "100m", (1, 2, 3), Load(8, 16), rounds=3)
        _compare_splits(bench, "0.6b", (2,), Load(8, 8), rounds=3)


def _compare_splits(
    bench: Bench, model: str, counts: tuple[int, ...], load: Load, *, rounds: int
) -> None:
    say(f"    {model}: {', '.join(map(str, counts))} nodes and mlx.launch, {rounds} rounds")
    directory, layers = bench.model(model), models.SHAPES[model].layers
    with ExitStack() as stack:
        clusters = {
            count: stack.enter_context(
                cluster(bench.place(f"split-{count}"), directory, layers, count)
            )
            for count in counts
        }
        peer: Peer | None = None
        # The bundled model is of a form that mlx_lm cannot pipeline.
        if models.SHAPES[model].config:
            peer = stack.enter_context(mlx_launch(directory, bench.root))
        for streams in (1, 8) if model != "0.6b" else (1,):
            _at_once(bench, model, clusters, peer, streams, load, rounds)
        if 2 in counts and model != "0.6b":
            _more_streams(bench, model, clusters[2], load, rounds)
        if model == "tiny":
            _overhead(bench, directory, layers, clusters[2], rounds)


def _at_once(
    bench: Bench,
    model: str,
    clusters: dict[int, Cluster],
    peer: Peer | None,
    streams: int,
    load: Load,
    rounds: int,
) -> None:
    servers: list[Server] = [*clusters.values(), *([peer] if peer else [])]
    key = f"split.{model}.{streams}"
    taken = measure(key, rounds, streams, load, *servers)
    results = dict(zip([*clusters, 0], taken, strict=False))
    at_once = f"{model}, {streams} at once"
    for count in clusters:
        if count > 1 and 1 in clusters:
            what = f"{at_once}, {count} nodes vs 1"
            compare_loads(bench, f"{key}.{count}", what, results[count], results[1])
    if peer:
        kind = f"split.{model}.launch" if streams == 1 else f"split.{model}.{streams}.launch"
        what = f"{at_once}, 2 nodes vs mlx.launch"
        compare_loads(bench, kind, what, results[2], results[0])


def _more_streams(bench: Bench, model: str, two: Cluster, load: Load, rounds: int) -> None:
    key = f"split.{model}.2.streams"
    answer = LONGER * load.answer
    many, one = alternate(
        rounds,
        lambda n: two.put(prompts(f"{key} many", n, 8, load.prompt), answer).tokens_per_s,
        lambda n: two.put(prompts(f"{key} one", n, 1, load.prompt), answer).tokens_per_s,
    )
    what = f"{model}, 2 nodes, 8 at once vs 1: all together"
    bench.compare(key, what, "tokens/s", many, one, more_is_better=True)


def _overhead(bench: Bench, directory: Path, layers: int, two: Cluster, rounds: int) -> None:
    """What a token takes over two nodes, less what the same two stages take without pxd."""
    prompt, answer = 32, 64
    cut = two.stages[0][1]
    with_pxd, alone = alternate(
        rounds,
        lambda n: 1e3 * two.put(prompts("overhead", n, 1, prompt), answer).token_s,
        lambda _: 1e3 * _forward_s(directory, layers, cut, prompt, answer),
    )
    beyond = [a - b for a, b in zip(with_pxd, alone, strict=True)]
    bench.figure("split.tiny.forward", "tiny, both forward passes alone: per token", "ms", *alone)
    what = "tiny, 2 nodes, beyond the forward passes: per token"
    bench.figure("split.tiny.overhead", what, "ms", *beyond)


def _forward_s(directory: Path, layers: int, cut: int, prompt: int, answer: int) -> float:
    arguments = [str(directory), *map(str, (layers, cut, prompt, answer))]
    command = [sys.executable, "-m", "scripts.benchmarks.forward", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=FORWARD_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchError(f"the forward passes alone: {done.stderr[-2000:]}")
    return float(done.stdout)
