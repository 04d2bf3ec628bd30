"""`pxd doctor`: what is wrong with this node and its network, and what to do about it."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli.options import DataDir, Node, fail, with_examples

if TYPE_CHECKING:
    from pxd.doctor.findings import Finding, Report

HELP = with_examples(
    "Examine this machine and its ways to the other nodes, in plain words with the remedy: can it "
    "be reached, does multicast work, is it the same key, the same release and the same model. "
    "Takes up to ten seconds. Without a daemon, it looks at the machine alone. "
    "Exit code 0: no problem; 1: there is one.",
    ("pxd doctor", "this machine's node"),
    ("pxd doctor --data-dir DIR", "another node on this machine"),
    ("pxd doctor --json", "for programs"),
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def _without_daemon(data_dir: Path, first: "Finding", *, silent: bool = False) -> "Report":
    import logging
    from functools import partial

    import trio

    from pxd.doctor import alone
    from pxd.settings import Settings, default_name

    # What an executor says when it fails is in the findings.
    logging.getLogger("pxd").setLevel(logging.CRITICAL)
    settings = Settings(data_dir=data_dir, name=default_name())
    return trio.run(partial(alone.examine, settings, first, silent=silent))


def examine(node: str | None, data_dir: Path | None) -> "Report":
    """By the daemon, or without it where it runs on this machine and cannot be asked."""
    from pxd.cli.client import Client, Refused, Unreachable
    from pxd.cli.find import (
        NoDaemon,
        NotRunning,
        data_dir_of_environment,
        find_controlled,
        start_command,
    )
    from pxd.doctor import findings

    directory = data_dir or data_dir_of_environment()
    try:
        found = find_controlled(node, data_dir)
    except NotRunning as error:
        text = str(error).partition(";")[0]
        remedy = f"start it:\n{start_command(error.data_dir)}"
        return _without_daemon(directory, findings.problem("daemon", text, remedy))
    except NoDaemon as error:
        fail(str(error))
    try:
        return Client(found.url, found.token).doctor()
    except Refused as error:
        if error.code == "unknown_url":
            fail(f"the daemon at {found.url} is of a release without a doctor; update pxd there")
        hint = "; run `pxd doctor` there" if error.code == "forbidden" else ""
        fail(f"{error}{hint}")
    except Unreachable as error:
        if found.pid is None:
            fail(str(error))
        text = f"the daemon (process {found.pid}) runs, but does not answer at {found.url}"
        remedy = (
            "is it stopped or the machine overloaded? If this lasts, end the process and start "
            f"it again:\nkill {found.pid}\n{start_command(directory)}"
        )
        return _without_daemon(directory, findings.problem("daemon", text, remedy), silent=True)


def _has_unicode() -> bool:
    return sys.stdout.encoding.lower().startswith("utf")


def _examine_with_sign(node: str | None, data_dir: Path | None) -> "Report":
    """Says on a terminal that something goes on."""
    if not sys.stderr.isatty():
        return examine(node, data_dir)
    from rich.console import Console

    with Console(stderr=True).status("examining; this takes a few seconds"):
        return examine(node, data_dir)


def doctor(node: Node = None, data_dir: DataDir = None, as_json: Json = False) -> None:
    try:
        report = _examine_with_sign(node, data_dir)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        import msgspec

        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        from pxd.cli import doctor_screen

        doctor_screen.show(report, unicode=_has_unicode())
    raise typer.Exit(0 if report.healthy else 1)
