"""`pxd stop`: a graceful end of a daemon on this machine."""

import time

from pxd.cli.find import Found, NoDaemon, find_daemon, is_running
from pxd.cli.options import DataDir, Node, fail, with_examples

HELP = with_examples(
    "Stop the daemon on this machine: it leaves the cluster, which goes on without it.",
    ("pxd stop", "the default instance"),
    ("pxd stop --data-dir DIR", "another one"),
)

DEADLINE_S = 30.0
POLL_S = 0.1


def _is_gone(found: Found) -> bool:
    from pxd.cli.client import Client, Refused, Unreachable

    if found.pid is not None:
        return not is_running(found.pid)
    try:
        Client(found.url).raw_status()
    except Unreachable:
        return True
    except Refused:
        return False
    return False


def stop(node: Node = None, data_dir: DataDir = None) -> None:
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_daemon(node, data_dir)
        Client(found.url).stop()
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
    deadline = time.monotonic() + DEADLINE_S
    while not _is_gone(found):
        if time.monotonic() > deadline:
            fail(f"the daemon is still leaving after {DEADLINE_S:g} s; its log says why")
        time.sleep(POLL_S)
    print(f"The daemon at {found.url} has left the cluster and ended.")
