"""A pipeline of engines in one process, driven by a naive scheduler. Used by checks that run in
processes of their own (`architecture_check.py`)."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec, StageInfo
from pxd.wire import Buffer, Coding, History, Opening, Row, Sampling, Step, Tensor

GREEDY = Sampling(temperature=0)


class Pipeline:
    """Stages in order. Hidden states travel as bytes, so nothing is shared by accident."""

    def __init__(self, engines: Sequence[MlxEngine], infos: Sequence[StageInfo]) -> None:
        self.engines = list(engines)
        self.trims = all(info.trims for info in infos)
        self._steps = itertools.count()
        self._open: set[int] = set()

    @classmethod
    def load(
        cls, path: Path, layers: int, cuts: Sequence[int] = (), coding: Coding | None = None
    ) -> "Pipeline":
        engines, infos = [], []
        for start, end in itertools.pairwise([0, *cuts, layers]):
            engines.append(MlxEngine())
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
        new = dict.fromkeys(row[0] for row in rows if row[0] not in self._open)
        self._open -= set(releases)
        self._open |= set(new)
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

    def release(self, requests: Sequence[int]) -> None:
        self._open -= set(requests)
        for engine in self.engines:
            engine.release(tuple(requests))
