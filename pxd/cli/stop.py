"""`pxd stop`: a graceful end of a daemon on this machine."""

import time

from pxd.cli.find import NoDaemon, find_controlled, is_running
from pxd.cli.options import DataDir, Node, fail, with_examples

HELP = with_examples(
    "Stop the daemon on this machine: it leaves the cluster, which goes on without it.",
    ("pxd stop", "the default instance"),
    ("pxd stop --data-dir DIR", "another one"),
)

DEADLINE_S = 30.0
POLL_S = 0.1


def stop(node: Node = None, data_dir: DataDir = None) -> None:
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        Client(found.url, found.token).stop()
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
    deadline = time.monotonic() + DEADLINE_S
    while found.pid is not None and is_running(found.pid):
        if time.monotonic() > deadline:
            fail(f"the daemon is still leaving after {DEADLINE_S:g} s; its log says why")
        time.sleep(POLL_S)
    print(f"The daemon at {found.url} has left the cluster and ended.")
