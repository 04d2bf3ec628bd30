"""The command line of scripts/bench."""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import httpx
import msgspec
import typer
from platformdirs import user_cache_path

from scripts.benchmarks import head, hop, links, memory, one, planning, prefix, report, split
from scripts.benchmarks.bench import DTYPE, Bench, say
from scripts.benchmarks.errors import BenchError

SECTIONS: dict[str, tuple[str, str, Callable[[Bench], None]]] = {
    "a": ("one", "one node and mlx_lm.server", one.run),
    "b": ("split", "two and three nodes, and mlx.launch", split.run),
    "c": ("hop", "one hop and a bare TLS socket", hop.run),
    "d": ("prefix", "a prompt that comes back and a new one", prefix.run),
    "e": ("links", "slow links", links.run),
    "f": ("head", "the head with an executor that does nothing", head.run),
    "g": ("memory", "memory: proportional set size, and RSS", memory.run),
}
MODELS = user_cache_path("pxd") / "bench"
FAILURES = (BenchError, httpx.HTTPError, subprocess.SubprocessError, OSError, ExceptionGroup)
PACKAGES = ("pxd", "mlx", "mlx-lm")
EXAMPLES = """
Examples

  scripts/bench                    everything, in less than 20 minutes on 2 cores

  scripts/bench --quick            fewer and smaller measurements, in a few minutes

  scripts/bench --only a,d         one node beside mlx_lm.server; a prompt that comes back

  scripts/bench --json bench.json  every sample besides, for programs

  scripts/bench plan               what planning takes for up to 1,000 nodes
"""

app = typer.Typer(add_completion=False, rich_markup_mode=None)
app.command()(planning.plan)


def _letters(only: str) -> list[str]:
    letters = [letter.strip() for letter in only.split(",")] if only else list(SECTIONS)
    unknown = [letter for letter in letters if letter not in SECTIONS]
    if unknown:
        known = ", ".join(f"{letter} ({what})" for letter, (_, what, _) in SECTIONS.items())
        raise typer.BadParameter(f"no measurement {', '.join(unknown)}; there are {known}")
    return letters


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def main(
    context: typer.Context,
    only: Annotated[str, typer.Option(metavar="a,b,…", help="Of a to g, these.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and smaller ones.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all samples.")] = None,
    models: Annotated[
        Path, typer.Option(metavar="DIR", help="Where models are made and kept.")
    ] = MODELS,
) -> None:
    """How fast pxd is on this machine, beside its peers: same models, same prompts, in turns.

    (a) one node and mlx_lm.server; (b) two and three nodes, and mlx.launch; (c) a hop; (d) the
    prefix cache; (e) slow links; (f) the head; (g) memory.
    """
    if context.invoked_subcommand is None:
        raise typer.Exit(_bench(_letters(only), quick=quick, json=json, models=models))


def _bench(letters: list[str], *, quick: bool, json: Path | None, models: Path) -> int:
    # Whoever ends it, however: all that it has started goes with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="pxd-bench-") as root:
        bench = Bench(Path(root), models, quick)
        seconds = {letter: _section(bench, letter) for letter in letters}
    _print(bench, letters)
    if json:
        found = report.Report(
            machine=report.machine(),
            versions={name: version(name) for name in PACKAGES},
            seconds=seconds,
            rows=bench.rows,
            skipped=bench.skipped,
        )
        json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
    return 1 if bench.failed else 0


def _section(bench: Bench, letter: str) -> float:
    section, what, run = SECTIONS[letter]
    say(f"==> ({letter}) {what}")
    began = time.monotonic()
    try:
        run(bench)
    except FAILURES as error:
        # The other ones are still worth their time.
        bench.fail(section, what, f"{type(error).__name__}: {error}")
    took = time.monotonic() - began
    say(f"    {took:.0f} s")
    return took


def _print(bench: Bench, letters: list[str]) -> None:
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"\n{versions}; {report.machine()}; weights in {DTYPE}")
    print("medians; ratios are how many times better, taken in turns, with their extremes")
    for letter in letters:
        section, what, _ = SECTIONS[letter]
        print(f"\n({letter}) {what}")
        for line in report.lines([row for row in bench.rows if row.section == section]):
            print(line)
        for left_out in bench.skipped:
            if left_out.section == section:
                print(f"  left out: {left_out.what}: {left_out.why}")
    print("\nWhere it must land")
    for line in report.floor_lines(bench.rows):
        print(line)


if __name__ == "__main__":
    sys.exit(app())
