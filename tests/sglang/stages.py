"""Pipelines of SGLang stages under the head's own scheduler, and what transformers answers."""

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM

from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import NewRequest, PlannedStep, Scheduler
from pxd.engine.speculation import Guesser, PromptLookup
from pxd.executors.protocol import LoadSpec
from pxd.wire import MAX_GUESSES, Buffer, SampledToken, Step
from tests.executors.steps import sampled_tokens, wire_step
from tests.sglang.remote import RemoteEngine, opened

LAYERS = 6
KV_BYTES = 2 << 20


class Stages:
    """Engines in order; hidden states travel as bytes."""

    def __init__(self, engines: Sequence[RemoteEngine], kv_tokens: int) -> None:
        self.engines, self.kv_tokens = list(engines), kv_tokens
        self.session = 0

    def step(self, step: Step, body: Buffer) -> Any:
        output: Any = ()
        for engine in self.engines:
            output = engine.step(step, body)
            if engine is not self.engines[-1]:
                tensor, body = output
                step = msgspec.structs.replace(step, tensor=tensor)
        return output

    def run(self, planned: PlannedStep) -> list[SampledToken]:
        return sampled_tokens(planned, self.step(*wire_step(planned, self.session)))

    def serve(
        self, requests: Sequence[NewRequest], guesser: Guesser | None = None, **options: Any
    ) -> dict[int, list[int]]:
        """Everybody's answer. Up to two steps are in flight, or more where there is guessing."""
        self.session += 1
        flights = 2 if guesser is None else 6
        config = ContinuousConfig(kv_tokens=self.kv_tokens, max_in_flight=flights, **options)
        policy = Continuous(config, PromptLookup if guesser is None else lambda: guesser)
        policy.guesses = 0 if guesser is None else MAX_GUESSES
        scheduler = Scheduler(policy)
        answers: dict[int, list[int]] = {request.number: [] for request in requests}
        for request in requests:
            scheduler.add(request)
        flying: deque[tuple[int, list[SampledToken]]] = deque()
        while True:
            planned = scheduler.next_step()
            if planned is not None:
                flying.append((planned.number, self.run(planned)))
            elif flying:
                for result in scheduler.step_done(*flying.popleft()):
                    answers[result.request] += result.tokens
            else:
                break
        assert not scheduler.requests
        assert policy.pool.used == 0
        return answers


@contextmanager
def pipeline(
    path: Path, cuts: Sequence[int], kinds: Sequence[str] = (), **options: Any
) -> Iterator[Stages]:
    specs = [
        LoadSpec(path=str(path), start=start, end=end, **{"kv_bytes": KV_BYTES, **options})
        for start, end in itertools.pairwise([0, *cuts, LAYERS])
    ]
    with opened(specs, kinds) as stages:
        yield Stages([engine for engine, _ in stages], min(info.kv_tokens for _, info in stages))


class Reference:
    """The model as transformers runs it, whole, one request at a time and without a cache."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """``(positions, vocabulary)``"""
        return self.model(torch.tensor([list(tokens)])).logits[0].float()

    def answer(self, tokens: Sequence[int], count: int) -> list[int]:
        sequence = list(tokens)
        for _ in range(count):
            sequence.append(int(self.logits(sequence)[-1].argmax()))
        return sequence[len(tokens) :]
