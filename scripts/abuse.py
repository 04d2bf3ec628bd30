"""The command line of scripts/abuse."""

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
from scripts.disorder.abuse import Abuse, Wanted, lines, run
from scripts.disorder.cluster import NAMES
from scripts.disorder.ground import ground
from scripts.disorder.stopping import until_stopped

EXAMPLES = """
Examples

  scripts/abuse                       half a minute of each kind of client

  scripts/abuse --seconds 180 --memory 0.01

Exit code 0: all got what they should, and all was given back; 1: not; 2: there was no cluster.
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(epilog=EXAMPLES)
def main(
    seconds: Annotated[float, typer.Option(min=1, help="How long each kind goes on.")] = 30.0,
    seed: Annotated[int, typer.Option()] = 0,
    leavers: Annotated[int, typer.Option(help="How many leave before the end.")] = 16,
    sippers: Annotated[int, typer.Option(help="How many take a byte a second.")] = 50,
    crowd: Annotated[int, typer.Option(help="How many come at once.")] = 200,
    tokens: Annotated[int, typer.Option(help="Of the answers that nobody reads.")] = 1000,
    memory: Annotated[float, typer.Option(help="GiB that each node offers; 0: all it has.")] = 0,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the logs.")] = False,
) -> None:
    """Three daemons, and clients that abuse them: some leave before their answer ends, some take a
    byte of it a second, many come at once, and one asks so much that others may have to wait. Tells
    what they got, how much memory it took, and what is left over."""
    wanted = Wanted(
        seed=seed,
        seconds=seconds,
        leavers=leavers,
        sippers=sippers,
        crowd=crowd,
        tokens=tokens,
        memory=memory,
    )
    root = Path(tempfile.mkdtemp(prefix="pxd-abuse-"))
    code = 2
    try:
        with ground(root, NAMES[:3]) as found:
            result = trio.run(until_stopped, partial(run, wanted, found, root))
        code = 130 if result is None else _tell(result, json)
    except* BenchError as group:
        print("\n".join(messages(group)), file=sys.stderr)
    if code == 0 and not keep:
        shutil.rmtree(root)
    else:
        print(f"logs are in {root}", file=sys.stderr)
    raise typer.Exit(code)


def _tell(result: Abuse, json: Path | None) -> int:
    print("\n".join(lines(result)))
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(app())
