"""The command line of scripts/chaos."""

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import trio
import typer

from scripts.benchmarks.errors import BenchError, messages
from scripts.disorder import report
from scripts.disorder.cluster import NAMES
from scripts.disorder.faults import WORDS
from scripts.disorder.ground import ground
from scripts.disorder.run import Wanted, run
from scripts.disorder.schedule import CAPACITIES, KINDS
from scripts.disorder.stopping import until_stopped

EXAMPLES = """
Examples

  scripts/chaos --minutes 3 --seed 7            four nodes, eight clients, three minutes

  scripts/chaos --minutes 10 --seed 7 --nodes 6

  scripts/chaos --seed 7 --dry                  only show what would befall whom, and when

Exit code 0: no answer was wrong or lost, and nothing was left over; 1: something was; 2: there was
no cluster to begin with.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
def main(
    minutes: Annotated[float, typer.Option(min=0.1, help="How long things go wrong.")] = 3.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same schedule.")] = 0,
    nodes: Annotated[int, typer.Option(min=min(CAPACITIES), max=max(CAPACITIES))] = 4,
    clients: Annotated[int, typer.Option(min=1, help="How many stream at a time.")] = 8,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the logs, also of a good run.")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry", help="Only show the schedule.")] = False,
) -> None:
    """A cluster of real daemons on this machine, clients that stream answers from all of them, and
    faults by a seed: killed daemons and executors, frozen ones, partitions, drains, joins and
    leaves, another model, full disks. Every answer is compared with that of an undisturbed run."""
    wanted = Wanted(seed=seed, minutes=minutes, nodes=nodes, clients=clients)
    if dry:
        for fault in wanted.faults(KINDS):
            names = ", ".join(NAMES[place] for place in fault.places)
            print(f"{fault.at:7.1f} s  {WORDS[fault.kind]} {names} {fault.lasting:g} s")
        return
    root = Path(tempfile.mkdtemp(prefix="pxd-chaos-"))
    code = _chaos(wanted, root, json)
    if code == 0 and not keep:
        shutil.rmtree(root)
    else:
        print(f"logs are in {root}", file=sys.stderr)
    raise typer.Exit(code)


def _chaos(wanted: Wanted, root: Path, json: Path | None) -> int:
    result: report.Report | None = None
    failed = False
    try:
        with ground(root, wanted.names) as found:
            result = trio.run(until_stopped, partial(run, wanted, found, root))
    except* BenchError as group:
        failed = True
        print("\n".join(messages(group)), file=sys.stderr)
    if failed:
        return 2
    if result is None:
        return 130
    print("\n".join(report.lines(result)))
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(app())
