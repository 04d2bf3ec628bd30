"""What the commands' options, help texts and failures have in common."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"

Node = Annotated[
    str | None,
    typer.Option(
        "--node",
        metavar="URL",
        help="The daemon's HTTP address, here or on another machine. [dim]\\[env: PXD_NODE][/dim]",
    ),
]

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        metavar="DIR",
        help="The data directory of a daemon on this machine. [dim]\\[env: PXD_DATA_DIR][/dim]",
    ),
]


def with_examples(summary: str, *examples: tuple[str, str]) -> str:
    """A help text: what the command does, then examples as (command line, what it does)."""
    width = max(len(command) for command, _ in examples)
    lines = [
        f"  [cyan]{command}[/cyan]{' ' * (width - len(command))}  [dim]{what}[/dim]"
        for command, what in examples
    ]
    # Typer strips and joins ordinary spaces.
    return f"{summary}\n\n[bold]Examples[/bold]\n\n" + "\n".join(
        line.replace(" ", _NO_BREAK_SPACE) for line in lines
    )


def fail(message: str, code: int = 1) -> NoReturn:
    """End the command with one line on stderr."""
    print(f"pxd: {message}", file=sys.stderr)
    raise typer.Exit(code)
