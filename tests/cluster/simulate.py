"""Simulated clusters for people; see scripts/simulate --help."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from typing import Annotated

import msgspec
import typer

from tests.cluster.scenarios import Measured, measure
from tests.cluster.schedules import Outcome, try_schedule

SAY_EVERY = 500

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_EXAMPLES = """
Examples:

  scripts/simulate                              10, 100 and 1,000 nodes, takes minutes

  scripts/simulate --nodes 10,100 --loss 0.01 --minutes 1

  scripts/simulate faults --runs 10000 --jobs 2

  scripts/simulate faults --runs 1 --seed 1513 --verbose
"""


@app.callback(invoke_without_command=True, epilog=_EXAMPLES)
def scale(
    context: typer.Context,
    nodes: Annotated[str, typer.Option(help="Sizes of the clusters.")] = "10,100,1000",
    loss: Annotated[float, typer.Option(help="Share of messages that get lost.")] = 0.01,
    seed: Annotated[int, typer.Option(help="Another seed, other luck.")] = 0,
    minutes: Annotated[float, typer.Option(help="Of virtual time without a fault.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Clusters in virtual time: the daemon's own membership and leadership, a made-up network.

    Of each size: how long until a death is suspected and known, what gossip costs, how long it
    takes a tenth of the nodes to come back, and what grows by how much with the number of nodes.
    The same seed gives the same figures everywhere.
    """
    if context.invoked_subcommand is not None:
        return
    try:
        sizes = sorted({int(size) for size in nodes.split(",")})
    except ValueError:
        raise typer.BadParameter("give numbers such as 10,100", param_hint="--nodes") from None
    if min(sizes) < 4:
        raise typer.BadParameter("clusters have four nodes at least", param_hint="--nodes")
    found = [measure(n, loss=loss, seed=seed, quiet_s=60 * minutes, say=_say) for n in sizes]
    if as_json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        for line in table(found):
            print(line)


@app.command()
def faults(
    runs: Annotated[int, typer.Option(help="How many schedules.")] = 10_000,
    seed: Annotated[int, typer.Option(help="The first one; the others follow.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes at once.")] = 1,
    verbose: Annotated[bool, typer.Option(help="Tell the steps of those that pass, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Random faults on three to nine nodes, and what must hold in the quiet after them.

    Crashes, restarts with and without data, frozen and slow nodes, partitions of one and both
    directions, loss, duplicates, skewed clocks, leaves, kicks, changed priorities. In the quiet
    after each schedule there must be one leader, one view and one epoch. Prints the seeds for which
    it is not so, and then exits with 1.
    """
    outcomes = list(_try_all(range(seed, seed + runs), jobs))
    failed = [outcome for outcome in outcomes if outcome.failure]
    if as_json:
        shown = outcomes if verbose else failed
        print(json.dumps({"runs": runs, "outcomes": msgspec.to_builtins(shown)}, indent=2))
    else:
        for outcome in outcomes if verbose else failed:
            _print_outcome(outcome)
        longest = max((o.settled_s for o in outcomes if not o.failure), default=0.0)
        print(
            f"{runs} schedules, {len(failed)} failed; "
            f"at most {longest:.1f} s from the last fault to one view"
        )
    raise typer.Exit(1 if failed else 0)


def table(found: list[Measured]) -> Iterator[str]:
    """One column per size, and behind each but the first by what it grew."""
    first = found[0]
    yield (
        f"{first.loss:.0%} loss, seed {first.seed}, {first.quiet_s / 60:g} virtual minutes "
        "without a fault; in brackets the growth"
    )
    yield f"{'nodes':<44}" + "".join(f"{each.nodes:>22}" for each in found)
    for label, pick in _ROWS:
        values = [pick(each) for each in found]
        cells = [f"{values[0]:.4g}"]
        for before, value in pairwise(values):
            growth = f" (x {value / before:.2f})" if before else ""
            cells.append(f"{value:.4g}{growth}")
        yield f"{label:<44}" + "".join(f"{cell:>22}" for cell in cells)


_ROWS: list[tuple[str, Callable[[Measured], float]]] = [
    ("no power: first suspicion, s", lambda m: m.power_loss.suspected_s),
    ("no power: known to all, s", lambda m: m.power_loss.everywhere_s),
    ("crash: first suspicion, s", lambda m: m.crash.suspected_s),
    ("crash: known to all, s", lambda m: m.crash.everywhere_s),
    ("memberlist's suspicion timeout, s", lambda m: m.memberlist_s),
    ("false deaths", lambda m: m.false_deaths),
    ("false suspicions, per node and hour", lambda m: m.false_suspicions_per_hour),
    ("messages per node and second", lambda m: m.quiet.messages),
    ("the same, busiest node", lambda m: m.quiet.busiest_messages),
    ("bytes per node and second", lambda m: m.quiet.bytes),
    ("the same, busiest node", lambda m: m.quiet.busiest_bytes),
    ("a tenth restarts: all known again, s", lambda m: m.restart_s),
    ("kB per node for each that restarts", lambda m: m.restart_kb),
    ("leader changes", lambda m: m.offices - 1),
]


def _try_all(seeds: range, jobs: int) -> Iterator[Outcome]:
    with ProcessPoolExecutor(jobs) as pool:
        for done, outcome in enumerate(pool.map(try_schedule, seeds, chunksize=20), start=1):
            if outcome.failure:
                _say(f"seed {outcome.seed} failed")
            if done % SAY_EVERY == 0:
                _say(f"{done} of {len(seeds)}")
            yield outcome


def _print_outcome(outcome: Outcome) -> None:
    end = outcome.failure or f"one view after {outcome.settled_s:.1f} s"
    print(f"seed {outcome.seed}: {end}")
    for step in outcome.steps:
        print(f"  {step}")


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    app()
