"""What all measurements share: where models lie, how often to repeat, where rows go."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol, TypeVar

from scripts.benchmarks import models
from scripts.benchmarks.load import Result
from scripts.benchmarks.report import Row, Skipped, compare

SampleT = TypeVar("SampleT")
DTYPE = "bfloat16"
"""Of all weights, here as well as at the peers."""


@dataclass
class Bench:
    """One run. `root` is a scratch directory; `quick` asks for fewer and smaller measurements."""

    root: Path
    models: Path
    quick: bool
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    failed: bool = False
    _places: Iterator[int] = field(default_factory=count)

    def model(self, name: str) -> Path:
        return models.model(name, self.models, DTYPE)

    def place(self, name: str) -> Path:
        """A path below `root` that nothing has used yet."""
        return self.root / f"{next(self._places)}-{name}"

    def compare(
        self,
        key: str,
        what: str,
        unit: str,
        ours: list[float],
        theirs: list[float],
        *,
        more_is_better: bool = False,
    ) -> None:
        section = key.partition(".")[0]
        row = compare(section, key, what, unit, ours, theirs, more_is_better=more_is_better)
        self.rows.append(row)

    def figure(self, key: str, what: str, unit: str, *samples: float) -> None:
        section = key.partition(".")[0]
        self.rows.append(Row(section=section, key=key, what=what, unit=unit, ours=samples))

    def skip(self, section: str, what: str, why: str) -> None:
        self.skipped.append(Skipped(section=section, what=what, why=why))
        say(f"    left out: {what}: {why}")

    def fail(self, section: str, what: str, why: str) -> None:
        self.failed = True
        self.skip(section, what, why)


def alternate(rounds: int, *sides: Callable[[int], SampleT]) -> list[list[SampleT]]:
    """Let all sides take turns: each has one sample per round. They are told the round."""
    samples: list[list[SampleT]] = [[] for _ in sides]
    for number in range(rounds):
        for kept, side in zip(samples, sides, strict=True):
            kept.append(side(number))
    return samples


def prompts(key: str, number: int, streams: int, tokens: int) -> tuple[str, ...]:
    """The same for all sides of a round, and such that no cache knows them from before."""
    return tuple(models.prompt(tokens, f"{key} {number} {place}") for place in range(streams))


@dataclass(frozen=True)
class Load:
    """What each stream asks for, in tokens."""

    prompt: int
    answer: int


class Server(Protocol):
    """Anything that can be asked: nodes or a peer."""

    def put(self, prompts: tuple[str, ...], tokens: int) -> Result: ...


def measure(
    key: str, rounds: int, streams: int, load: Load, *servers: Server
) -> list[list[Result]]:
    """Let servers take turns with the same load, after a first one of each that does not count."""

    def ask(server: Server) -> Callable[[int], Result]:
        return lambda number: server.put(prompts(key, number, streams, load.prompt), load.answer)

    warm_up = Load(8, 4)
    for server in servers:
        server.put(prompts(f"{key} warm", 0, streams, warm_up.prompt), warm_up.answer)
    return alternate(rounds, *(ask(server) for server in servers))


def compare_loads(
    bench: Bench, key: str, what: str, ours: Sequence[Result], theirs: Sequence[Result]
) -> None:
    """Rows for the time to the first token, the time per token and the tokens per second."""
    series: tuple[tuple[str, str, str, Callable[[Result], float]], ...] = (
        ("ttft", "first token", "ms", lambda result: 1e3 * result.ttft_s),
        ("token", "per token", "ms", lambda result: 1e3 * result.token_s),
        ("rate", "all together", "tokens/s", lambda result: result.tokens_per_s),
    )
    for name, of_what, unit, figure in series:
        a, b = [figure(result) for result in ours], [figure(result) for result in theirs]
        more = name == "rate"
        bench.compare(f"{key}.{name}", f"{what}: {of_what}", unit, a, b, more_is_better=more)


def say(line: str) -> None:
    """Progress, for whoever waits."""
    print(line, file=sys.stderr, flush=True)
