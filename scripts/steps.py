"""What the padded-batch policy does in every step of a scenario; see scripts/steps --help."""

import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pxd.engine.padded import Padded, PaddedConfig
from pxd.engine.scheduler import NeverFits, NewRequest, Scheduler
from pxd.wire import SampledToken, Sampling

app = typer.Typer(add_completion=False)

Positive = Annotated[int, msgspec.Meta(ge=1)]


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """Requests by place: lengths, most tokens to generate, and the step in which each arrives."""

    name: str
    max_num_seqs: Positive
    max_model_len: Positive
    prompts_lengths: list[Positive]
    seqs_max_tokens: list[Positive]
    steps_add_reqs: list[Annotated[int, msgspec.Meta(ge=0)]]
    block_size: Positive = 64
    available_blocks: Positive | None = None
    max_batch_tkv_limit: Positive | None = None


class Scenarios(msgspec.Struct, frozen=True):
    scenarios: list[Scenario]


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One step. Requests are named by their place; the newest comes first, but for `waiting`."""

    scenario: str
    step: int
    tkv: int
    waiting: list[str]
    running: list[str]
    request_outputs: list[str]
    finished_requests: list[str]
    n_reserved_blocks: int
    n_used_blocks: int


def play(scenario: Scenario) -> Iterator[Line]:
    """All steps, up to the one that clears the batch after the last request."""
    policy = Padded(
        PaddedConfig(
            max_running=scenario.max_num_seqs,
            max_model_len=scenario.max_model_len,
            block=scenario.block_size,
            available_blocks=scenario.available_blocks,
            max_batch_tkv=scenario.max_batch_tkv_limit,
        )
    )
    scheduler = Scheduler(policy)
    arrivals: dict[int, list[int]] = defaultdict(list)
    for number, step in enumerate(scenario.steps_add_reqs):
        arrivals[step].append(number)
    step = 0
    while True:
        was_running = scheduler.admitted
        outputs, finished = _run(scheduler)
        for number, reason in scheduler.take_refused():
            _say_refused(scenario, number, reason)
        for number in arrivals.pop(step, ()):
            _add(scheduler, scenario, number)
        # Who was admitted and done in the same step is in neither list, and newer than all others.
        places = {number: place for place, number in enumerate(was_running)}
        newest = sorted(outputs, key=lambda number: -places.get(number, len(places)))
        yield Line(
            scenario=scenario.name,
            step=step,
            tkv=policy.tkv,
            waiting=[str(number) for number in scheduler.queued],
            running=[str(number) for number in reversed(scheduler.admitted)],
            request_outputs=[str(number) for number in newest],
            finished_requests=[str(number) for number in newest if number in finished],
            n_reserved_blocks=policy.reserved,
            n_used_blocks=policy.used,
        )
        if not arrivals and not scheduler.requests and policy.tkv == 0:
            return
        step += 1


def _run(scheduler: Scheduler) -> tuple[list[int], set[int]]:
    """One engine step; returns who got a token, and whose was the last."""
    step = scheduler.next_step()
    if step is None or not step.rows:
        if step is not None:
            scheduler.step_done(step.number, ())
        return [], set()
    tokens = [SampledToken(row.request, row.position + row.count, 0) for row in step.rows]
    results = scheduler.step_done(step.number, tokens)
    ended = {result.request for result in results if result.finish is not None}
    return [result.request for result in results], ended


def _add(scheduler: Scheduler, scenario: Scenario, number: int) -> None:
    request = NewRequest(
        number=number,
        tokens=[0] * scenario.prompts_lengths[number],
        max_new=scenario.seqs_max_tokens[number],
        sampling=Sampling(temperature=0),
    )
    try:
        scheduler.add(request)
    except NeverFits as error:
        _say_refused(scenario, number, str(error))


def _say_refused(scenario: Scenario, number: int, reason: str) -> None:
    print(f"{scenario.name}: request {number} is refused: {reason}", file=sys.stderr)


def read(path: Path) -> Scenarios:
    """Raises `typer.BadParameter` with what is wrong."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Scenarios)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    for scenario in found.scenarios:
        counts = {
            len(scenario.prompts_lengths),
            len(scenario.seqs_max_tokens),
            len(scenario.steps_add_reqs),
        }
        if len(counts) != 1:
            raise typer.BadParameter(
                f"{path}: {scenario.name} has lists of unlike length; prompts_lengths, "
                "seqs_max_tokens and steps_add_reqs have one entry for each request"
            )
    return found


@app.command()
def main(
    file: Annotated[Path, typer.Argument(help="Scenarios, as in scheduler_steps.json.")],
) -> None:
    """Run every scenario of FILE through the scheduler with the padded-batch policy.

    Prints one JSON line for each step. A request that can never fit is refused, on stderr, and the
    others go on. Exit code 2: FILE cannot be used.

    Example: scripts/steps tests/engine/data/scheduler_steps.json | grep '"step":12,'
    """
    for scenario in read(file).scenarios:
        for line in play(scenario):
            print(json.dumps(msgspec.to_builtins(line), separators=(",", ":")))


if __name__ == "__main__":
    app()
