"""Running pxd commands: in this process, or as a person's shell would."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner, Result

from pxd.cli.main import app
from tests.api.fakes import DEADLINE_S, TOKEN


def pxd(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pxd", *arguments]


def run(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


def write_daemon_file(root: Path, url: str, pid: int | None = None, token: str = TOKEN) -> None:
    root.mkdir(parents=True, exist_ok=True)
    content = {"pid": pid or os.getpid(), "http": url, "started": time.time(), "token": token}
    (root / "daemon.json").write_text(json.dumps(content))


def ended_pid() -> int:
    """The id of a process that is gone."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(DEADLINE_S)
    return process.pid
