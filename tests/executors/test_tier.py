"""The second tier with real engines and a real file: answers stay what they are without it."""

import os
import random
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import NewRequest, Scheduler
from pxd.executors.choice import installed_kinds
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec, StepRejected
from pxd.wire import Copied, Copy, Grant, Opening, Row, SampledToken, Sampling, Step, Tensor
from tests.tiny_models import VOCABULARY, make_tiny_model

from .test_under_load import LAYERS, Engines, answer_alone, make_requests

REQUESTS = 24
GREEDY = Sampling(temperature=0)
PATIENCE_S = 60.0
KINDS = [kind for kind in ("mlx", "torch") if kind in installed_kinds()]

pytestmark = pytest.mark.slow
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny_model("qwen3", directory, dtype="float32")


@pytest.fixture(scope="module")
def requests() -> list[NewRequest]:
    return make_requests(random.Random(64))[:REQUESTS]


@pytest.fixture(scope="module")
def alone(model: Path, requests: list[NewRequest]) -> dict[int, list[int]]:
    engines = Engines(model, ())
    return {request.number: answer_alone(engines, request) for request in requests}


def open_engines(model: Path, cuts: tuple[int, ...], directory: Path, kind: str = "mlx") -> Engines:
    return Engines(model, cuts, kind, tier_bytes=32 << 20, tier_directory=str(directory))


CASES = [
    ("mlx", (), "lazy", "reserve"),
    ("mlx", (2,), "eager", "preempt"),
    ("mlx", (2, 4), "lazy", "preempt"),
    # Against what MLX gives alone: kinds agree, too.
    ("torch", (2,), "lazy", "preempt"),
]


class Served:
    """A scheduler over engines. What the stages report arrives when it arrives."""

    def __init__(self, engines: Engines, **options: Any) -> None:
        self.engines = engines
        self.policy = Continuous(
            ContinuousConfig(
                stages=len(engines.stages), tier_slots=engines.info.tier_slots, **options
            )
        )
        self.scheduler = Scheduler(self.policy)
        self.answers: dict[int, list[int]] = {}
        self.flying: deque[tuple[int, list[SampledToken]]] = deque()
        self.loads = 0
        engines.session += 1

    def take_reports(self, *, wait: bool = False) -> None:
        while wait or not self.engines.copied.empty():
            stage, word = self.engines.copied.get(timeout=PATIENCE_S)
            wait = False
            if word.session == self.engines.session:
                self.scheduler.copied(word.event, stage, word.failed)

    def turn(self, *, send: bool = True) -> bool:
        """Send a step or take one's results; False if there is nothing to do."""
        self.take_reports()
        step = self.scheduler.next_step() if send else None
        if step is not None:
            self.loads += len(step.load.blocks) if step.load else 0
            self.flying.append((step.number, self.engines.run(step)))
        elif self.flying:
            for result in self.scheduler.step_done(*self.flying.popleft()):
                self.answers.setdefault(result.request, []).extend(result.tokens)
        elif self.policy.tier.copying:
            self.take_reports(wait=True)
        else:
            return False
        return True

    def settle(self) -> None:
        while self.turn():
            pass
        assert not self.scheduler.requests
        assert self.policy.pool.used == 0


@pytest.mark.parametrize(
    ("kind", "cuts", "store", "admission"), [case for case in CASES if case[0] in KINDS]
)
def test_everybody_gets_what_it_would_get_alone(
    model: Path,
    requests: list[NewRequest],
    alone: dict[int, list[int]],
    tmp_path: Path,
    kind: str,
    cuts: tuple[int, ...],
    store: Any,
    admission: Any,
) -> None:
    rng = random.Random(len(cuts))
    served = Served(
        open_engines(model, cuts, tmp_path, kind),
        kv_tokens=10 * BLOCK_TOKENS,
        max_in_flight=len(cuts) + 1,
        prefill_chunk=90,
        admission=admission,
        tier_store=store,
    )
    arrivals = deque(requests)
    while arrivals or served.scheduler.requests:
        if arrivals and rng.random() < 0.4:
            served.scheduler.add(arrivals.popleft())
        served.turn(send=rng.random() < 0.7)
    served.settle()
    assert served.answers == alone
    assert served.loads > 0
    assert served.policy.tier.retired == 0


def tokens_of(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(count)]


def served_twice(served: Served, meanwhile: Callable[[], None] = lambda: None) -> list[list[int]]:
    """One request, then others that take its blocks, `meanwhile`, and the same one again."""
    rng = random.Random(3)
    prompt = tokens_of(rng, 3 * BLOCK_TOKENS + 5)
    capacity = served.policy.pool.capacity * BLOCK_TOKENS
    for number in range(3):
        if number == 2:
            meanwhile()
        tokens = tokens_of(rng, capacity - 10) if number == 1 else prompt
        served.scheduler.add(NewRequest(number=number, tokens=tokens, max_new=10, sampling=GREEDY))
        served.settle()
    return [served.answers[0], served.answers[2]]


def tier_file(directory: Path) -> Path:
    """The only open file there, which has no name any more."""
    links = [path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    [found] = [path for path in links if os.readlink(path).startswith(f"{directory}/")]
    return found


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc and /dev/full")


@needs_proc
@each_kind
def test_a_hit_is_loaded_from_a_file_that_leaves_nothing_behind(
    model: Path, tmp_path: Path, kind: str
) -> None:
    served = Served(open_engines(model, (), tmp_path / "cache", kind), kv_tokens=7 * BLOCK_TOKENS)
    first, second = served_twice(served)
    assert first == second
    assert served.loads == 3
    assert list((tmp_path / "cache").iterdir()) == []
    assert tier_file(tmp_path / "cache").stat().st_size > 0


@needs_proc
def test_what_cannot_be_read_is_computed_again(model: Path, tmp_path: Path) -> None:
    served = Served(open_engines(model, (), tmp_path / "cache"), kv_tokens=7 * BLOCK_TOKENS)
    first, second = served_twice(served, lambda: os.truncate(tier_file(tmp_path / "cache"), 0))
    assert first == second
    assert served.loads == 3
    assert served.policy.tier.retired == 1
    assert served.policy.tier.slots.cached > 0


@needs_proc
def test_a_full_disk_is_no_end(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = os.open("/dev/full", os.O_RDWR)
    monkeypatch.setattr(os, "dup", lambda _: full)
    engines = open_engines(model, (), tmp_path)
    monkeypatch.undo()
    served = Served(engines, kv_tokens=7 * BLOCK_TOKENS)
    first, second = served_twice(served)
    assert first == second
    assert served.loads == 0
    assert served.policy.tier.retired > 0


def test_no_directory_and_no_room_mean_no_tier(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for directory, size in ((tmp_path / "file" / "cache", 32 << 20), (tmp_path, 1000)):
        engine = MlxEngine()
        spec = LoadSpec(
            path=str(model), start=0, end=3, tier_bytes=size, tier_directory=str(directory)
        )
        assert engine.load(spec, lambda _: None).tier_slots == 0


def test_caches_of_several_kinds_have_no_tier(tmp_path: Path) -> None:
    path = make_tiny_model("gemma3_text", tmp_path / "gemma3", dtype="float32")
    engine = MlxEngine()
    spec = LoadSpec(
        path=str(path), start=0, end=LAYERS, tier_bytes=32 << 20, tier_directory=str(tmp_path)
    )
    info = engine.load(spec, lambda _: None)
    assert (info.tier_slots, info.prefix_cache) == (0, False)
    for kind in ("store", "load"):
        with pytest.raises(StepRejected, match="no second KV tier"):
            engine.step(empty_step(**{kind: Copy(0, (0,), (0,))}), b"")


def empty_step(number: int = 0, **more: Any) -> Step:
    usual = {"session": 1, "rows": (), "tensor": Tensor("i32", (0,))}
    return Step(pipeline="p", step=number, **{**usual, **more})


@each_kind
def test_absurd_copies_are_reported_as_failed(model: Path, tmp_path: Path, kind: str) -> None:
    engines = open_engines(model, (), tmp_path, kind)
    [engine] = engines.stages
    slots = engines.info.tier_slots
    engine.step(empty_step(store=Copy(5, (99,), (0,)), load=Copy(6, (98,), (0,))), b"")
    with pytest.raises(StepRejected, match="2 blocks for 1 slots"):
        engine.step(empty_step(store=Copy(4, (1, 2), (0,))), b"")
    opening = {"openings": (Opening(1, GREEDY),), "grants": (Grant(1, (0, 1)),)}
    # The wrong order, a slot that nothing is in, and one that does not exist.
    engine.step(empty_step(1, load=Copy(7, (1, 0), (0, 1)), **opening), b"")
    engine.step(empty_step(2, load=Copy(8, (0,), (3,))), b"")
    tokens = np.arange(BLOCK_TOKENS, dtype="<i4")
    filled = Step(
        pipeline="p",
        session=1,
        step=3,
        rows=(Row(1, 0, BLOCK_TOKENS, 0),),
        tensor=Tensor("i32", tokens.shape),
    )
    engine.step(filled, tokens.tobytes())
    engine.step(empty_step(4, store=Copy(9, (0, 1), (slots, 1))), b"")
    words = [engines.copied.get(timeout=PATIENCE_S)[1] for _ in range(5)]
    assert words == [
        Copied(pipeline="p", session=1, event=5, failed=(0,)),
        Copied(pipeline="p", session=1, event=6, failed=(0,)),
        Copied(pipeline="p", session=1, event=7, failed=(0, 1)),
        Copied(pipeline="p", session=1, event=8, failed=(3,)),
        Copied(pipeline="p", session=1, event=9, failed=(slots, 1)),
    ]


@each_kind
def test_who_leaves_during_a_load_leaves_nothing(model: Path, tmp_path: Path, kind: str) -> None:
    """Before the first of its blocks is there, so that it has no arrays yet."""
    served = Served(open_engines(model, (2,), tmp_path, kind), kv_tokens=7 * BLOCK_TOKENS)

    def leave() -> None:
        rng = random.Random(3)
        prompt = tokens_of(rng, 3 * BLOCK_TOKENS + 5)
        served.scheduler.add(NewRequest(number=9, tokens=prompt, max_new=10, sampling=GREEDY))
        step = served.scheduler.next_step()
        assert step is not None
        assert step.load is not None
        served.engines.run(step)
        assert served.scheduler.cancel(9)
        served.scheduler.step_done(step.number, [])
        served.scheduler.add(NewRequest(number=8, tokens=[1, 2], max_new=10, sampling=GREEDY))
        served.settle()

    first, second = served_twice(served, leave)
    assert first == second
    assert served.loads == 3


@each_kind
def test_a_new_session_finds_nothing_of_the_old(model: Path, tmp_path: Path, kind: str) -> None:
    """Not even where a head would ask for it."""
    engines = open_engines(model, (), tmp_path, kind)
    served = Served(engines, kv_tokens=7 * BLOCK_TOKENS)
    served_twice(served)
    [engine] = engines.stages
    opening = {"openings": (Opening(1, GREEDY),), "grants": (Grant(1, (0,)),)}
    engine.step(empty_step(session=2, load=Copy(0, (0,), (0,)), **opening), b"")
    assert engines.copied.get(timeout=PATIENCE_S)[1].failed == (0,)
