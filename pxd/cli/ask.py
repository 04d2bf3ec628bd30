"""Telling the daemon of this machine what to do."""

from pathlib import Path
from typing import TypeVar

from pxd.cli.find import NoDaemon, find_controlled
from pxd.cli.options import fail

AnswerT = TypeVar("AnswerT")


def ask(
    path: str, body: object, answer: type[AnswerT], node: str | None, data_dir: Path | None
) -> AnswerT:
    """What the daemon answers to a POST of `body`. Ends the command, saying why, if it cannot be
    reached or refuses."""
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        return Client(found.url, found.token).control("POST", path, answer, body)
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
