"""The head's scheduler over real engines, under load: everybody gets what it would get alone.

The model is float32 with random weights, so that no two logits are near enough for the order of
additions to matter.
"""

import itertools
import queue
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import NewRequest, PlannedStep, Scheduler
from pxd.executors.backends import load_backend
from pxd.executors.choice import installed_kinds
from pxd.executors.protocol import Engine, LoadSpec
from pxd.wire import Copied, SampledToken, Sampling
from tests.executors.steps import sampled_tokens, wire_step
from tests.tiny_models import VOCABULARY, make_tiny_model

LAYERS = 6
REQUESTS = 32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny_model("qwen3", directory, dtype="float32")


class Engines:
    """Stages in order; hidden states travel as bytes. `copied` has (stage, report) of the tier."""

    def __init__(self, path: Path, cuts: Sequence[int], kind: str = "mlx", **options: Any) -> None:
        self.stages: list[Engine] = []
        self.copied: queue.SimpleQueue[tuple[int, Copied]] = queue.SimpleQueue()
        for start, end in itertools.pairwise([0, *cuts, LAYERS]):
            number = len(self.stages)
            backend = load_backend(kind)
            self.stages.append(backend.engine(lambda word, n=number: self.copied.put((n, word))))
            spec = LoadSpec(path=str(path), start=start, end=end, **options)
            self.info = self.stages[-1].load(spec, lambda _: None)
        self.session = 0

    def run(self, planned: PlannedStep) -> list[SampledToken]:
        step, body = wire_step(planned, self.session)
        output: Any = ()
        for stage in self.stages:
            output = stage.step(step, body)
            if stage is not self.stages[-1]:
                tensor, body = output
                body = bytes(body)
                step = msgspec.structs.replace(step, tensor=tensor)
        return sampled_tokens(planned, output)


def make_requests(rng: random.Random) -> list[NewRequest]:
    families = [[rng.randrange(VOCABULARY) for _ in range(200)] for _ in range(3)]
    requests = []
    for number in range(REQUESTS):
        shared = rng.choice(families)[: rng.choice([0, 64, 100, 128, 200])]
        own = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 80))]
        sampling = Sampling(
            temperature=rng.choice([0.0, 0.8]),
            top_p=0.95,
            seed=number,
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            frequency_penalty=rng.choice([0.0, 0.0, 0.5]),
        )
        requests.append(
            NewRequest(
                number=number, tokens=shared + own, max_new=rng.randint(1, 24), sampling=sampling
            )
        )
    return requests


@pytest.fixture(scope="module")
def requests() -> list[NewRequest]:
    return make_requests(random.Random(64))


@pytest.fixture(scope="module")
def alone(model: Path, requests: list[NewRequest]) -> list[list[int]]:
    """What each gets alone, from the model in one piece."""
    engines = Engines(model, ())
    return [answer_alone(engines, request) for request in requests]


def answer_alone(engines: Engines, request: NewRequest) -> list[int]:
    engines.session += 1
    scheduler = Scheduler(Continuous(ContinuousConfig(kv_tokens=4096)))
    scheduler.add(request)
    tokens: list[int] = []
    while (step := scheduler.next_step()) is not None:
        for result in scheduler.step_done(step.number, engines.run(step)):
            tokens += result.tokens
    return tokens


class Knowing:
    """Knows all answers, and errs now and then."""

    def __init__(self, texts: Sequence[Sequence[int]], dice: random.Random) -> None:
        self.texts, self.dice = texts, dice
        self.guessed = self.right = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        known = len(tokens)
        (text,) = [text for text in self.texts if list(text[:known]) == list(tokens)]
        guesses = list(text[known : known + self.dice.randint(0, most)])
        if guesses and self.dice.random() < 0.5:
            guesses[self.dice.randrange(len(guesses))] = self.dice.randrange(VOCABULARY)
        return guesses

    def learn(self, guessed: int, right: int) -> None:
        self.guessed += guessed
        self.right += right


CASES = [
    ("mlx", (), "reserve", 512, 40, 0),
    ("mlx", (2,), "preempt", 1, 12, 0),
    ("mlx", (2, 4), "preempt", 37, 12, 0),
    ("mlx", (), "preempt", 64, 10, 16),
    ("mlx", (3,), "reserve", 512, 20, 5),
    ("mlx", (2, 4), "preempt", 37, 10, 16),
    # Against what MLX gives alone: kinds agree, too.
    ("torch", (3,), "preempt", 64, 12, 0),
    ("torch", (), "preempt", 37, 10, 16),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cuts", "admission", "chunk", "blocks", "guesses"),
    [case for case in CASES if case[0] in installed_kinds()],
)
def test_everybody_gets_what_it_would_get_alone(
    model: Path,
    requests: list[NewRequest],
    alone: list[list[int]],
    kind: str,
    cuts: tuple[int, ...],
    admission: Any,
    chunk: int,
    blocks: int,
    guesses: int,
) -> None:
    rng = random.Random(blocks + chunk)
    engines = Engines(model, cuts, kind)
    wanted = alone[:]
    texts = [[*r.tokens, *a] for r, a in zip(requests, alone, strict=True)]
    knowing = Knowing(texts, random.Random(chunk))
    policy = Continuous(
        ContinuousConfig(
            kv_tokens=blocks * 64,
            # All of those who run guess while there are no more than this.
            max_in_flight=6 if guesses else len(cuts) + 1,
            max_running=8 if guesses else 16,
            prefill_chunk=chunk,
            step_tokens=max(chunk, 16),
            admission=admission,
        ),
        lambda: knowing,
    )
    policy.guesses = guesses
    scheduler = Scheduler(policy)
    arrivals = deque(requests)
    cancelled = set(rng.sample(range(REQUESTS), 8))
    answers: dict[int, list[int]] = {number: [] for number in range(REQUESTS)}
    flying: deque[tuple[int, list[SampledToken]]] = deque()
    used_again = 0
    while arrivals or scheduler.requests or flying:
        if arrivals and rng.random() < 0.4:
            scheduler.add(arrivals.popleft())
        step = scheduler.next_step() if rng.random() < 0.7 else None
        if step is not None:
            used_again += sum(opening.cached for opening in step.openings)
            flying.append((step.number, engines.run(step)))
        elif flying:
            for result in scheduler.step_done(*flying.popleft()):
                answers[result.request] += result.tokens
                if result.request in cancelled and rng.random() < 0.3:
                    scheduler.cancel(result.request)
                    wanted[result.request] = answers[result.request][:]
    assert answers == dict(enumerate(wanted))
    assert used_again > 0
    assert (0 < knowing.right < knowing.guessed) == bool(guesses)
    assert policy.pool.used == 0
