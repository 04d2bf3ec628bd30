"""The command line of scripts/kills."""

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
from scripts.disorder import toll
from scripts.disorder.cluster import NAMES
from scripts.disorder.ground import ground
from scripts.disorder.killing import Killed, kill_all
from scripts.disorder.stopping import until_stopped
from scripts.disorder.victims import LAYOUTS, WORDS, Kind, Layout

EXAMPLES = "\n\n".join(
    (
        "Kinds",
        *(f"  {kind:<10} {words}" for kind, words in WORDS.items()),
        "Exit code 0: every answer that there was time for came and was right, and nothing was "
        "left over; 1: something was amiss; 2: there was no cluster.",
    )
)

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
def main(
    times: Annotated[int, typer.Option(min=1, help="Deaths of each kind.")] = 10,
    seed: Annotated[int, typer.Option(help="Another seed, other victims.")] = 0,
    clients: Annotated[int, typer.Option(min=1, help="How many stream at a time.")] = 8,
    only: Annotated[
        list[str] | None, typer.Option(metavar="KIND", help="These kinds; may be repeated.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures.")] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the logs, also of a good run.")
    ] = False,
) -> None:
    """Kill nodes and executors under load, one at a time, where another pipeline can take over.
    Says how long clients waited once the death could be known, and for what. One kind has no other
    pipeline: there the node comes back after ten seconds."""
    if unknown := set(only or ()) - set(WORDS):
        raise typer.BadParameter(f"no such kind: {', '.join(sorted(unknown))}", param_hint="--only")
    found = []
    code = 0
    for layout in LAYOUTS:
        kinds = [kind for kind in layout.kinds if not only or kind in only]
        if kinds:
            killed = _kill(layout, kinds, times, seed, clients, keep=keep)
            code = max(code, 2 if killed is None else 0)
            found += [killed] if killed else []
    tolls = [each for killed in found for each in killed.tolls]
    amiss = [words for killed in found for words in killed.amiss]
    print("\n".join([*toll.lines(tolls), *amiss]))
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    bad = amiss or not all(each.passed for each in tolls)
    raise typer.Exit(max(code, 1 if bad else 0))


def _kill(
    layout: Layout, kinds: list[Kind], times: int, seed: int, clients: int, *, keep: bool
) -> Killed | None:
    root = Path(tempfile.mkdtemp(prefix="pxd-kills-"))
    killed = None
    try:
        with ground(root, NAMES[: len(layout.capacities)]) as found:
            run = partial(kill_all, layout, kinds, times, seed, clients, found)
            killed = trio.run(until_stopped, run)
    except* BenchError as group:
        print("\n".join(messages(group)), file=sys.stderr)
    good = killed and not killed.amiss and all(each.passed for each in killed.tolls)
    if good and not keep:
        shutil.rmtree(root)
    else:
        print(f"logs are in {root}", file=sys.stderr)
    return killed


if __name__ == "__main__":
    sys.exit(app())
