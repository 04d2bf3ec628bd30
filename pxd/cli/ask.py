"""Telling the daemon of this machine what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pxd.cli import progress
from pxd.cli.find import NoDaemon, find_controlled
from pxd.cli.options import fail

if TYPE_CHECKING:
    from pxd.serving.status import ClusterStatus

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


def ask_patiently(
    path: str,
    body: object,
    answer: type[AnswerT],
    node: str | None,
    data_dir: Path | None,
    words: Callable[["ClusterStatus"], str],
    *,
    quiet: bool,
) -> AnswerT:
    """Likewise, for what takes the daemon minutes; shows what `words` say of its status then."""
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        client = Client(found.url, found.token)
        return progress.meanwhile(
            node,
            data_dir,
            lambda: client.control("POST", path, answer, body, timeout=None),
            words,
            quiet=quiet,
        )
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
