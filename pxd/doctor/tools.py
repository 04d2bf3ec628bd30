"""Asks the system's own tools, which may be absent, slow, or not for everybody."""

import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

TIMEOUT_S = 3.0
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


class Answer(msgspec.Struct, frozen=True):
    """`code` is the exit status; `text` both its streams, standard output first."""

    code: int
    text: str


Ask = Callable[[Sequence[str]], Awaitable[Answer | None]]
"""Runs a command that only reads. None: it is not installed, or did not answer in time."""


async def ask(command: Sequence[str]) -> Answer | None:
    program = shutil.which(command[0], path=_PATH)
    if program is None:
        return None
    with trio.move_on_after(TIMEOUT_S):
        try:
            done = await trio.run_process(
                [program, *command[1:]],
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError:
            return None
        output = done.stdout + done.stderr
        return Answer(done.returncode, output.decode(errors="replace"))
    return None
