"""`pxd kick`: ban a node from the cluster, or let it in again."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli import key
from pxd.cli.find import NoDaemon, find_controlled
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.cli.client import Client
    from pxd.serving.doorview import Kick

HELP = with_examples(
    "Ban a node from the cluster: every member hangs up on it and never lets it in again. It still "
    "knows the cluster's key, with which its owner can come back under another identity, so "
    "replace the key as well unless you trust the owner.",
    ("pxd kick ben", "by name, peer id or the beginning of one"),
    ("pxd kick --rotate ben", "and replace the key, which ben does not get"),
    ("pxd kick --list", "who is banned"),
    ("pxd kick --undo ben", "let it in again"),
)

NOT_STORED = (
    "This node could not write that down (its log says why) and forgets it when it restarts, until "
    "another member tells it."
)

Who = Annotated[
    str | None,
    typer.Argument(metavar="NODE", help="A name, a peer id, or the beginning of a peer id."),
]
Undo = Annotated[bool, typer.Option("--undo", help="Let the node in again.")]
List = Annotated[bool, typer.Option("--list", help="Show who is banned.")]
Rotate = Annotated[
    bool, typer.Option("--rotate", help="Also replace the cluster's key, at once and everywhere.")
]


def kick(
    who: Who = None,
    undo: Undo = False,
    show: List = False,
    rotate: Rotate = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    if show == (who is not None):
        fail("name one node to kick, or ask for the --list", 2)
    if undo + show + rotate > 1:
        fail("--undo, --list and --rotate exclude each other", 2)
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        client = Client(found.url, found.token)
        text = _list(client, as_json) if who is None else _kick(client, who, undo, rotate, as_json)
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
    sys.stdout.write(text)


def _list(client: "Client", as_json: bool) -> str:
    bans = client.control("GET", "/cluster/bans", dict[str, list[dict[str, str]]])
    if as_json:
        return key.as_json_text(bans)
    lines = [
        f"{clean(ban['id'])}  {clean(ban['name']) or '-'}  banned by {clean(ban['by'])}\n"
        for ban in bans["bans"]
    ]
    return "".join(lines) or "Nobody is banned.\n"


def _kick(client: "Client", who: str, undo: bool, rotate: bool, as_json: bool) -> str:
    from pxd.serving.doorview import Kick

    if undo:
        result = client.control("POST", "/cluster/pardon", Kick, {"node": who})
    else:
        body = {"node": who, "rotate": rotate}
        result = client.control("POST", "/cluster/kick", Kick, body)
    return key.as_json_text(result) if as_json else _report(result)


def _report(result: "Kick") -> str:
    name = f"{clean(result.node.name) or 'The node'} ({clean(result.node.id)})"
    remedy = "They learn of it as soon as they meet a member that knows."
    stored = [] if result.stored else [NOT_STORED]
    if not result.banned:
        lines = [f"{name} may come in again; it tries by itself within two minutes.", *stored]
        return "\n".join([*lines, *key.told(result.told, remedy)]) + "\n"
    lines = [f"{name} is banned from the cluster.", *stored, *key.told(result.told, remedy)]
    text = "\n".join(lines) + "\n"
    if result.rotation:
        return text + key.report(result.rotation)
    return text + "It still knows the cluster's key: run `pxd key rotate --grace 0` next.\n"
