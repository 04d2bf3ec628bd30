"""`pxd stop`: a graceful end of a daemon on this machine."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli import progress
from pxd.cli.find import Found, NoDaemon, find_controlled, is_running
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.cli.client import Client

HELP = with_examples(
    "Stop the daemon on this machine: it leaves the cluster once others serve in its place, as far "
    "as they can, and its own clients have their answers. `pxd start --leave-timeout` says how "
    "long it waits for that.",
    ("pxd stop", "the default instance"),
    ("pxd stop --now", "and have it wait for nothing"),
    ("pxd stop --data-dir DIR", "another one"),
)

GOODBYE_S = 15.0
"""What leaving takes when nothing more is waited for, on a machine that is busy."""
POLL_S = 0.2

Now = Annotated[bool, typer.Option("--now", help="Do not wait for others to take over.")]


def stop(now: Now = False, node: Node = None, data_dir: DataDir = None) -> None:
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        client = Client(found.url, found.token)
        within = client.stop(now=now).within
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
    with progress.shown() as show:
        if not _wait(found, client, within + GOODBYE_S, show):
            fail(f"the daemon is still leaving after {within + GOODBYE_S:g} s; its log says why")
    print(f"The daemon at {found.url} has left the cluster and ended.")


def _wait(found: Found, client: "Client", seconds: float, show: progress.Show) -> bool:
    """Whether the daemon ends in that time."""
    deadline = time.monotonic() + seconds
    while found.pid is not None and is_running(found.pid):
        if time.monotonic() > deadline:
            return False
        if words := _waits_for(client):
            show(words)
        time.sleep(POLL_S)
    return True


def _waits_for(client: "Client") -> str:
    from pxd.cli.client import Refused, Unreachable

    try:
        status = client.status()
    except (Unreachable, Refused):
        # It answers no longer, which is as it should be.
        return ""
    if not status.waits_for:
        return ""
    loading = progress.loading(status)
    return f"waiting for {clean(status.waits_for)}" + (f"; {loading}" if loading else "")
