"""A pipeline of engines in one process, driven by a naive scheduler. Used by checks that run in
processes of their own (`architecture_check.py`), too."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pxd.engine.blocks import blocks_for
from pxd.executors.backends import load_backend
from pxd.executors.protocol import Engine, LoadSpec, StageInfo
from pxd.wire import Buffer, Coding, Grant, History, Opening, Row, Sampling, Step, Tensor

GREEDY = Sampling(temperature=0)


def new_engine(kind: str) -> Engine:
    if kind == "sglang":
        from tests.sglang.shared import SharedEngine

        return SharedEngine()
    return load_backend(kind).engine(lambda _: None)


def granted(request: int) -> Grant:
    """Two blocks that no other request has."""
    return Grant(request, (2 * request, 2 * request + 1))


class Pipeline:
    """Stages in order. Hidden states travel as bytes, so nothing is shared by accident."""

    def __init__(self, engines: Sequence[Engine], infos: Sequence[StageInfo] = ()) -> None:
        self.engines = list(engines)
        self.trims = bool(infos) and all(info.trims for info in infos)
        self._steps = itertools.count()
        self._blocks: dict[int, list[int]] = {}
        self._free = list(reversed(range(2048)))

    @classmethod
    def load(
        cls,
        path: Path,
        layers: int,
        cuts: Sequence[int] = (),
        coding: Coding | None = None,
        kinds: Sequence[str] = ("mlx",),
    ) -> "Pipeline":
        """The stages' engines are of `kinds` by turns."""
        engines, infos = [], []
        ranges = itertools.pairwise([0, *cuts, layers])
        for (start, end), kind in zip(ranges, itertools.cycle(kinds), strict=False):
            engines.append(new_engine(kind))
            spec = LoadSpec(path=str(path), start=start, end=end, kv_bytes=1 << 30)
            infos.append(engines[-1].load(spec, lambda _: None))
            engines[-1].send_as(coding)
        return cls(engines, infos)

    def step(
        self,
        rows: Sequence[tuple[int, int, Sequence[int], int]],
        samplings: dict[int, Sampling] | None = None,
        releases: Sequence[int] = (),
        histories: dict[int, History | None] | None = None,
    ) -> tuple[Any, ...]:
        """Run rows of (request, position, tokens, draws); returns the drawn tokens."""
        tokens = np.array([token for row in rows for token in row[2]], "<i4")
        self._give_back(releases)
        new = dict.fromkeys(row[0] for row in rows if row[0] not in self._blocks)
        step = Step(
            pipeline="p",
            session=1,
            step=next(self._steps),
            rows=tuple(Row(r, position, len(t), int(draws)) for r, position, t, draws in rows),
            tensor=Tensor("i32", tokens.shape),
            openings=tuple(
                Opening(r, (samplings or {}).get(r, GREEDY), history=(histories or {}).get(r))
                for r in new
            ),
            grants=self._grants(rows),
            releases=tuple(releases),
        )
        body: Buffer = tokens.tobytes()
        output: Any = ()
        for engine in self.engines:
            output = engine.step(step, body)
            if engine is not self.engines[-1]:
                tensor, body = output
                body = bytes(body)
                step = msgspec.structs.replace(step, tensor=tensor)
        return output

    def prefill(
        self, request: int, prompt: Sequence[int], chunk: int = 2048, **kwargs: Any
    ) -> None:
        """Everything but the last token of the prompt."""
        for begin in range(0, len(prompt) - 1, chunk):
            end = min(begin + chunk, len(prompt) - 1)
            self.step([(request, begin, prompt[begin:end], False)], **kwargs)

    def generate(
        self, prompt: Sequence[int], count: int, *, request: int = 1, chunk: int = 2048
    ) -> list[int]:
        """Greedy tokens of one request alone."""
        self.prefill(request, prompt, chunk)
        sequence = list(prompt)
        for _ in range(count):
            sequence += self.step([(request, len(sequence) - 1, sequence[-1:], True)])
        self.release([request])
        return sequence[len(prompt) :]

    def _grants(self, rows: Sequence[tuple[int, int, Sequence[int], int]]) -> tuple[Grant, ...]:
        grants = []
        for request, position, tokens, _ in rows:
            table = self._blocks.setdefault(request, [])
            count = blocks_for(position + len(tokens)) - len(table)
            if count > 0:
                more = [self._free.pop() for _ in range(count)]
                grants.append(Grant(request, tuple(more)))
                table += more
        return tuple(grants)

    def _give_back(self, requests: Sequence[int]) -> None:
        for request in requests:
            self._free += reversed(self._blocks.pop(request, []))

    def release(self, requests: Sequence[int]) -> None:
        self._give_back(requests)
        for engine in self.engines:
            engine.release(tuple(requests))
