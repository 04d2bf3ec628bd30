"""What coding hidden states on their way between stages does to a model's logits.

    python -m tests.executors.coding_effect DIRECTORY [--cuts 9 18] [--tokens 512]

Prints a table over random tokens, which says most of models with random weights.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import mlx.core as mx
import numpy as np

from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.loader import load_stage
from pxd.executors.mlx.stage import Stage
from pxd.executors.mlx.tensors import from_wire, to_wire
from pxd.models.describe import describe_checkpoint
from pxd.wire import Coding


class Effect(NamedTuple):
    """Over all positions: the greatest change of a logit and the logits' own standard deviation,
    Kullback-Leibler divergence in nats from the exact distribution (mean and greatest), and the
    share of positions with the same likeliest token."""

    worst: float
    deviation: float
    divergence: float
    worst_divergence: float
    agreement: float


def load_stages(path: Path, cuts: Sequence[int]) -> list[Stage]:
    checkpoint = describe_checkpoint(path)
    bounds = [0, *cuts, describe(path).layers]
    return [
        load_stage(path, checkpoint, start, end, lambda _: None).stage
        for start, end in itertools.pairwise(bounds)
    ]


def logits(
    stages: Sequence[Stage], texts: Sequence[Sequence[int]], coding: Coding | None
) -> np.ndarray:
    """f32 ``(tokens of all texts, vocabulary)``, of one pass over each."""
    return np.concatenate([_logits(stages, tokens, coding) for tokens in texts])


def _logits(stages: Sequence[Stage], tokens: Sequence[int], coding: Coding | None) -> np.ndarray:
    state = mx.array(list(tokens))[None]
    for stage in stages:
        state = stage.forward(state, stage.make_caches())
        if not stage.last:
            tensor, body = to_wire(state[0], coding)
            assert tensor.coding == coding
            state = from_wire(tensor, bytes(body))[None]
    return np.array(state[0].astype(mx.float32))


def effect(exact: np.ndarray, coded: np.ndarray) -> Effect:
    p, q = _log_softmax(exact), _log_softmax(coded)
    divergences = (np.exp(p) * (p - q)).sum(axis=-1)
    return Effect(
        worst=float(np.abs(exact - coded).max()),
        deviation=float(exact.std()),
        divergence=float(divergences.mean()),
        worst_divergence=float(divergences.max()),
        agreement=float((exact.argmax(axis=-1) == coded.argmax(axis=-1)).mean()),
    )


def _log_softmax(values: np.ndarray) -> np.ndarray:
    values = values - values.max(axis=-1, keepdims=True)
    return values - np.log(np.exp(values).sum(axis=-1, keepdims=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cuts", type=int, nargs="+", default=[1])
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    stages = load_stages(arguments.directory, arguments.cuts)
    draw = np.random.default_rng(0)
    texts = draw.integers(0, stages[-1].vocabulary, (4, arguments.tokens // 4)).tolist()
    print(f"{'':6}", *(f"{name:>16}" for name in Effect._fields))
    exact = logits(stages, texts, None)
    for coding in get_args(Coding):
        found = effect(exact, logits(stages, texts, coding))
        print(f"{coding:6}", *(f"{value:16.5f}" for value in found))


if __name__ == "__main__":
    main()
