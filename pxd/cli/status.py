"""`pxd status`: the cluster at a glance."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli.options import DataDir, Node, fail, with_examples

if TYPE_CHECKING:
    from rich.console import RenderableType

    from pxd.serving.status import ClusterStatus

HELP = with_examples(
    "Show the cluster as a node sees it: nodes, leader, models, and who holds which layers.",
    ("pxd status", "once"),
    ("pxd status --watch", "live, until Ctrl-C"),
    ("pxd status --json", "for programs"),
    ("pxd status --node http://ben:8470", "as another node sees it"),
)

WATCH_EVERY_S = 1.0

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Update every second until Ctrl-C.")]


Fetched = tuple[bytes, "ClusterStatus"]
"""The status as the daemon sent it, and what it means."""


class Failed(Exception):
    """No status could be had; the message is for people."""


def fetch(node: str | None, data_dir: Path | None) -> Fetched:
    """Looks for the daemon anew, as it may have come back elsewhere. Raises `Failed`."""
    from pxd.cli.client import Client, Refused, Unreachable
    from pxd.cli.find import NoDaemon, find_daemon

    try:
        client = Client(find_daemon(node, data_dir).url)
        raw = client.raw_status()
        return raw, client.parse_status(raw)
    except (NoDaemon, Unreachable, Refused) as error:
        raise Failed(str(error)) from error


def has_unicode() -> bool:
    return sys.stdout.encoding.lower().startswith("utf")


def _can_draw() -> bool:
    return sys.stdout.isatty() and has_unicode()


def _json(fetched: Fetched, indent: int) -> str:
    import msgspec

    return msgspec.json.format(fetched[0], indent=indent).decode() + "\n"


def _text(fetched: Fetched) -> str:
    from pxd.cli import overview, plain

    return plain.render(overview.overview(fetched[1]), arrow="→" if has_unicode() else "->")


def _screen(fetched: Fetched) -> "RenderableType":
    from pxd.cli import overview, screen

    return screen.Screen(overview.overview(fetched[1]))


def status(
    node: Node = None, data_dir: DataDir = None, as_json: Json = False, watch: Watch = False
) -> None:
    def get() -> Fetched:
        return fetch(node, data_dir)

    try:
        if watch:
            _watch(get, as_json=as_json)
            return
        fetched = get()
    except Failed as error:
        fail(str(error))
    except KeyboardInterrupt:
        return
    if _can_draw() and not as_json:
        from rich.console import Console

        Console(highlight=False).print(_screen(fetched))
    else:
        sys.stdout.write(_json(fetched, 2) if as_json else _text(fetched))


def _watch(get: Callable[[], Fetched], *, as_json: bool) -> None:
    if _can_draw() and not as_json:
        _watch_screen(get)
        return
    last = ""
    for fetched, problem in _every_second(get):
        if fetched is None:
            print(f"pxd: {problem}; trying again", file=sys.stderr)
        elif as_json:
            sys.stdout.write(_json(fetched, 0))
        elif (text := _text(fetched)) != last:
            sys.stdout.write(f"{text}\n")
            last = text
        sys.stdout.flush()


def _every_second(get: Callable[[], Fetched]) -> Iterator[tuple[Fetched | None, str]]:
    """The status, or None and why there is none. The first must be had: raises `Failed`."""
    yield get(), ""
    while True:
        time.sleep(WATCH_EVERY_S)
        try:
            yield get(), ""
        except Failed as error:
            yield None, str(error)


def _watch_screen(get: Callable[[], Fetched]) -> None:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.styled import Styled
    from rich.text import Text

    shown: RenderableType = Text()
    gone_since = 0.0
    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        for fetched, problem in _every_second(get):
            if fetched is not None:
                shown, gone_since = _screen(fetched), 0.0
                live.update(Group(shown, Text("\nCtrl-C ends", "bright_black")), refresh=True)
                continue
            gone_since = gone_since or time.monotonic()
            seconds = time.monotonic() - gone_since
            warning = Text(f"\n✗ {problem}\n  trying again; gone for {seconds:.0f} s", "red")
            live.update(Group(Styled(shown, "dim"), warning), refresh=True)
