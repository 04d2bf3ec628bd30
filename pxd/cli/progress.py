"""Waiting until the cluster has done what it was told, and saying how far it is."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pxd.cli.options import fail
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.serving.status import ClusterStatus

EVERY_S = 0.5
QUIET_S = 1.0
"""What takes no longer is over before anyone could read about it."""

STUCK_S = 5.0
"""The plan needs a moment to follow what was told, so it is not stuck before that."""

NoWait = Annotated[
    bool, typer.Option("--no-wait", help="Return at once; `pxd status` shows how far it is.")
]

Show = Callable[[str], None]
ResultT = TypeVar("ResultT")


class Stuck(Exception):
    """It will not come about by itself; the message says why and what to do."""


@contextlib.contextmanager
def shown(*, quiet: bool = False) -> Iterator[Show]:
    """Shows where things stand on stderr: in one line on a terminal, else line by line."""
    terminal = sys.stderr.isatty()
    last = ""

    def show(words: str) -> None:
        nonlocal last
        if words != last and not quiet:
            line = f"\r\x1b[K  {words}" if terminal else f"  {words}\n"
            sys.stderr.write(line)
            sys.stderr.flush()
        last = words

    try:
        yield show
    finally:
        if terminal and last and not quiet:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def wait(
    node: str | None,
    data_dir: Path | None,
    left: Callable[["ClusterStatus"], str],
    *,
    quiet: bool,
) -> None:
    """Returns when `left` has nothing to say of the status; shows what it says, unless `quiet`.

    Ends the command if it stays stuck, if the daemon goes away, and at Ctrl-C.
    """
    with shown(quiet=quiet) as show:
        _watch(node, data_dir, left, show)


def _watch(
    node: str | None, data_dir: Path | None, left: Callable[["ClusterStatus"], str], show: Show
) -> None:
    from pxd.cli.status import Failed, fetch

    stuck_since = None
    try:
        while True:
            try:
                words, stuck_since = left(fetch(node, data_dir)[1]), None
            except Stuck as error:
                stuck_since = stuck_since or time.monotonic()
                if time.monotonic() - stuck_since > STUCK_S:
                    fail(str(error))
                words = "planning"
            if not words:
                return
            show(words)
            time.sleep(EVERY_S)
    except Failed as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("pxd: it goes on without being watched", file=sys.stderr)
        raise typer.Exit(130) from None


def meanwhile(
    node: str | None,
    data_dir: Path | None,
    call: Callable[[], ResultT],
    words: Callable[["ClusterStatus"], str],
    *,
    quiet: bool,
) -> ResultT:
    """What `call` returns or raises, however long it takes: the daemon is asked for its status all
    the time, and what `words` say of it is shown, unless `quiet`.

    Ends the command if the daemon goes away, and at Ctrl-C.
    """
    answer: Future[ResultT] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised where the answer is asked for
            answer.set_exception(error)

    began = time.monotonic()

    def left(status: "ClusterStatus") -> str:
        # Where each change is a line, time is no change.
        passed = f" ({time.monotonic() - began:.0f} s)" if sys.stderr.isatty() else ""
        return "" if answer.done() else words(status) + passed

    # A daemon thread: it does not keep the command from ending.
    threading.Thread(target=run, daemon=True).start()
    with contextlib.suppress(TimeoutError):
        return answer.result(QUIET_S)
    wait(node, data_dir, left, quiet=quiet)
    return answer.result()


def loading(status: "ClusterStatus") -> str:
    """Which stages are on their way."""
    parts = [
        f"{clean(node.name)} loads {clean(stage.model)} [{stage.start},{stage.end}), "
        f"{stage.progress:.0%} done" + (f", {clean(stage.reason)}" if stage.reason else "")
        for node in status.nodes
        for stage in node.stages
        if stage.state == "loading"
    ]
    return "; ".join(parts)
