"""`pxd ticket`: the one line that another machine needs to join."""

from pxd.cli.find import NoDaemon, NotRunning, find_controlled, start_command
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.settings import DataFiles

HELP = with_examples(
    "Print the line that lets another machine join. It holds the cluster's key: keep it private.",
    ("pxd ticket", "here"),
    ("pxd start --join TICKET", "then, on the other machine"),
)


def ticket(node: Node = None, data_dir: DataDir = None) -> None:
    from pxd.cli.client import Client, Refused, Unreachable

    try:
        found = find_controlled(node, data_dir)
        print(Client(found.url, found.token).ticket())
    except NotRunning as error:
        if not DataFiles(error.data_dir).cluster_key.exists():
            fail(str(error))
        fail(
            "a ticket holds the daemon's addresses, so the daemon has to run: start it with "
            f"`{start_command(error.data_dir)}`, then ask again"
        )
    except (NoDaemon, Unreachable, Refused) as error:
        fail(str(error))
