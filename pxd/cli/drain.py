"""`pxd drain` and `pxd resume`: take a node out of service without a lost request, and back."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli import key, progress
from pxd.cli.ask import ask
from pxd.cli.options import DataDir, Node, with_examples
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.serving.drain import Drained
    from pxd.serving.status import ClusterStatus, NodeView

HELP = with_examples(
    "Take a node out of service: others load what it holds, its requests end or move there, and it "
    "is left with nothing. It stays a member, answers clients, and remembers it across restarts.",
    ("pxd drain ben", "and wait until it holds nothing, by name or peer id"),
    ("pxd drain --no-wait ben", "only ask for it"),
    ("pxd resume ben", "undo it"),
)
RESUME_HELP = with_examples(
    "Let a drained node take part again.", ("pxd resume ben", "by name, peer id or its beginning")
)

Who = Annotated[
    str, typer.Argument(metavar="NODE", help="A name, a peer id, or the beginning of a peer id.")
]


def drain(
    who: Who,
    no_wait: progress.NoWait = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    result = _ask("/cluster/drain", who, node, data_dir)
    name = clean(result.node.name or result.node.id)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
    else:
        print(f"{name} is drained; `pxd resume {name}` undoes that.")
    if not no_wait:
        progress.wait(node, data_dir, lambda status: _left(status, result.node.id), quiet=as_json)
        if not as_json:
            print(f"{name} holds nothing of any model now. It is safe to stop it.")


def resume(
    who: Who, node: Node = None, data_dir: DataDir = None, as_json: key.Json = False
) -> None:
    result = _ask("/cluster/resume", who, node, data_dir)
    name = clean(result.node.name or result.node.id)
    done = f"{name} takes part again." if result.changed else f"{name} was not drained."
    sys.stdout.write(key.as_json_text(result) if as_json else f"{done}\n")


def _ask(path: str, who: str, node: str | None, data_dir: Path | None) -> "Drained":
    from pxd.serving.drain import Drained

    return ask(path, {"node": who}, Drained, node, data_dir)


def _left(status: "ClusterStatus", peer: str) -> str:
    """What the node still holds, in words; empty once that is nothing. Raises `progress.Stuck`."""
    found = next((each for each in status.nodes if each.id == peer), None)
    if found is None or found.state in ("dead", "left"):
        return ""
    if not found.drained:
        return "waiting for it to be known here"
    if found.stages:
        _check_replaceable(status, found)
        held = ", ".join(
            f"{clean(stage.model)} [{stage.start},{stage.end})" for stage in found.stages
        )
        loading = progress.loading(status)
        return f"it still holds {held}" + (f"; {loading}" if loading else "")
    return ""


def _check_replaceable(status: "ClusterStatus", node: "NodeView") -> None:
    """A model that cannot be served without the node goes on being served with it."""
    for model in status.models:
        needed = any(stage.node == node.id for chain in model.retiring for stage in chain)
        if needed and not model.pipelines and model.state == "serving" and model.reason:
            name, what = clean(node.name), clean(model.name)
            raise progress.Stuck(
                f"{name} is drained, but {what} goes on being served with it, as the others cannot "
                f"serve it without {name}: {clean(model.reason)}. Start more nodes, or end it with "
                f"`pxd models stop {what}`; `pxd resume {name}` undoes the drain"
            )
