"""What `pxd start` says once the node is up."""

import os
import shlex
import sys
from typing import TYPE_CHECKING, TextIO

from pxd import __version__
from pxd.settings import Settings, default_data_dir

if TYPE_CHECKING:
    from pxd.node import Started


def is_journal(stream: TextIO) -> bool:
    """Whether systemd keeps what is written there (see JOURNAL_STREAM in systemd.exec(5))."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def text(settings: Settings, started: "Started", *, show_ticket: bool) -> str:
    which = ""
    if settings.data_dir != default_data_dir():
        which = f" --data-dir {shlex.quote(str(settings.data_dir))}"
    lines = [
        f"pxd {__version__}: node {started.name} is up",
        "",
        f"  API     {started.http}/v1",
        f"  status  pxd status{which}",
        f"  chat    pxd chat{which}",
        "",
    ]
    if show_ticket:
        lines += ["On other machines, with the cluster's key in it, so keep it private:"]
        lines += ["", f"  pxd start --join {started.ticket}", ""]
    else:
        lines += [f"`pxd ticket{which}` prints what other machines need to join.", ""]
    return "\n".join(lines)


def welcome(settings: Settings, started: "Started") -> None:
    # A journal is kept, and read by more people than the ticket is meant for.
    print(text(settings, started, show_ticket=not is_journal(sys.stdout)), flush=True)
    if sys.stdout.isatty():
        print("Ctrl-C leaves the cluster; a second one does not wait for others.", flush=True)
