"""Which daemon a command talks to."""

import os
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import msgspec

from pxd.settings import DataFiles, default_data_dir
from pxd.wire import DECODE_ERRORS


class NoDaemon(Exception):
    """No daemon can be addressed; the message says what to do."""


class NotRunning(NoDaemon):
    """No daemon runs with that data directory."""

    def __init__(self, message: str, data_dir: Path) -> None:
        super().__init__(message)
        self.data_dir = data_dir


class DaemonFile(msgspec.Struct, frozen=True):
    """What a daemon writes into its data directory while it runs. `started` is Unix time."""

    pid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    http: str
    started: float
    token: str = ""


class Found(msgspec.Struct, frozen=True):
    """A daemon's URL; its process id and control token if its data directory is known."""

    url: str
    pid: int | None = None
    token: str = ""


def is_running(pid: int) -> bool:
    """Whether a process of that id exists and has not ended."""
    import psutil

    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def as_url(node: str) -> str:
    """A URL without a path from a URL or HOST:PORT. Raises `NoDaemon`."""
    try:
        parts = urlsplit(node if "://" in node else f"http://{node}")
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise NoDaemon(f"{node!r} is not the URL of a node; it looks like http://127.0.0.1:8470")
    return f"{parts.scheme}://{parts.netloc}"


def find_daemon(node: str | None, data_dir: Path | None) -> Found:
    """By `--node`, `--data-dir`, PXD_NODE, PXD_DATA_DIR or the default instance, in this order.

    Raises `NoDaemon`.
    """
    if node is None and data_dir is None:
        node = os.environ.get("PXD_NODE") or None
    if node is not None:
        return Found(as_url(node))
    return read_daemon_file(data_dir or data_dir_of_environment())


def find_controlled(node: str | None, data_dir: Path | None) -> Found:
    """Like `find_daemon`, for what only the daemon's own user may do. Raises `NoDaemon`.

    A daemon that is named by its URL must be that of the data directory.
    """
    found = find_daemon(node, data_dir)
    if found.token:
        return found
    root = data_dir or data_dir_of_environment()
    try:
        known = read_daemon_file(root)
    except NoDaemon as error:
        raise NoDaemon(
            f"the control token of {found.url} is not at hand ({error}); "
            "run this on its machine, as the user that runs the daemon, with --data-dir DIR"
        ) from error
    if not known.token:
        raise NoDaemon(f"the daemon of {root} is of an older release of pxd; restart it")
    if known.url != found.url.replace("//localhost:", "//127.0.0.1:"):
        raise NoDaemon(
            f"{found.url} is not the daemon of {root}, whose control token could be read; "
            "run this on its machine, as the user that runs the daemon, with --data-dir DIR"
        )
    return known


def data_dir_of_environment() -> Path:
    named = os.environ.get("PXD_DATA_DIR")
    return Path(named) if named else default_data_dir()


def start_command(data_dir: Path) -> str:
    """What a person types to start a daemon with that data directory."""
    return "pxd start" if data_dir == default_data_dir() else f"pxd start --data-dir {data_dir}"


def read_daemon_file(data_dir: Path) -> Found:
    """Raises `NotRunning`, and `NoDaemon` for a file that cannot be used."""
    path = DataFiles(data_dir).daemon
    start = start_command(data_dir)
    try:
        content = msgspec.json.decode(path.read_bytes(), type=DaemonFile)
    except FileNotFoundError:
        raise NotRunning(
            f"no daemon runs with the data directory {data_dir}; "
            f"start one with `{start}`, or name another node with --node URL",
            data_dir,
        ) from None
    except OSError as error:
        raise NoDaemon(
            f"cannot read {path}: {error.strerror or error}; run this as the user that runs the "
            "daemon, or name another one's directory with --data-dir"
        ) from error
    except DECODE_ERRORS as error:
        raise NoDaemon(f"{path} is damaged; restart the daemon with `{start}`") from error
    if not is_running(content.pid):
        raise NotRunning(
            f"the daemon of {data_dir} (process {content.pid}) has ended without saying goodbye; "
            f"start it again with `{start}`",
            data_dir,
        )
    return Found(as_url(content.http), content.pid, content.token)
