"""`pxd key rotate`: a new cluster key for a cluster that runs on."""

import math
import re
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli.ask import ask
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.cli.words import clean, duration

if TYPE_CHECKING:
    from pxd.serving.doorview import Rotation, Told

ROTATE_HELP = with_examples(
    "Replace the cluster's key on all nodes while they run. Nodes that are off get in with the old "
    "key, and are given the new one, until the grace period ends; after it, old tickets and nodes "
    "with the old key are refused.",
    ("pxd key rotate", "nodes that are off have 24 hours to come back"),
    ("pxd key rotate --grace 7d", "or a week"),
    ("pxd key rotate --grace 0", "the old key ends at once, say because it leaked"),
    ("pxd ticket", "then, for new nodes: a ticket with the new key"),
)

SUPERSEDED = (
    "The key before the old one counted until now, and does no more: nodes that have been off "
    "since then need a fresh ticket."
)

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd]?)")

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Grace = Annotated[
    str,
    typer.Option(
        "--grace", metavar="TIME", help="For how long the old key still counts: 90s, 30m, 24h, 7d."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def parse_duration(text: str) -> float:
    """Seconds. Raises ValueError with a message for people."""
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else math.inf
    if not math.isfinite(seconds):
        raise ValueError(f"{text!r} is no length of time; it looks like 30m, 24h, 7d or 0")
    return seconds


@app.callback()
def _key() -> None:
    """Keeps `rotate` a command of its own although it is the only one."""


@app.command("rotate", help=ROTATE_HELP, short_help="Replace the cluster's key.")
def rotate(
    grace: Grace = "24h", node: Node = None, data_dir: DataDir = None, as_json: Json = False
) -> None:
    try:
        seconds = parse_duration(grace)
    except ValueError as error:
        fail(f"--grace: {error}", 2)
    from pxd.serving.doorview import Rotation

    rotation = ask("/cluster/key/rotate", {"grace": seconds}, Rotation, node, data_dir)
    sys.stdout.write(as_json_text(rotation) if as_json else report(rotation))


def as_json_text(content: object) -> str:
    import msgspec

    return msgspec.json.format(msgspec.json.encode(content), indent=2).decode() + "\n"


def report(rotation: "Rotation") -> str:
    """What a person needs to know after a rotation."""
    if rotation.grace:
        old = f"The old key still opens the door for {duration(rotation.grace)}."
        tickets = "So do the tickets printed before"
        remedy = "They get the new key when they come back before the old one ends."
    else:
        old = "The old key opens the door no more."
        tickets = "Tickets printed before are void"
        remedy = "Start them with `pxd start --join TICKET` and a fresh ticket if they stay out."
    lines = [
        f"The cluster has a new key, its number {rotation.generation + 1}. {old}",
        f"{tickets}; `pxd ticket` prints a new one.",
        *([SUPERSEDED] if rotation.superseded else []),
        *told(rotation.told, remedy),
    ]
    return "\n".join(lines) + "\n"


def told(result: "Told", remedy: str) -> list[str]:
    """Lines that say which members know."""
    count = len(result.confirmed)
    lines = [f"{count} other node{'' if count == 1 else 's'} confirmed it."]
    if result.unconfirmed:
        names = ", ".join(f"{clean(node.name)} ({clean(node.id)})" for node in result.unconfirmed)
        lines.append(f"Not confirmed yet by {names}. {remedy}")
    return lines
