"""Room on disk for what an executor needs for a while; gone with it, however it ends.

Whoever starts an executor names a directory for it, and removes that when the process has ended:
executors mostly end by being killed, and could not.
"""

import logging
import os
import secrets
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger("pxd.executors")

VARIABLE = "PXD_SCRATCH"
"""Of the environment: tells an executor the name."""


def name_directory(root: Path | None) -> Path:
    """A new name in `root`, or where the system has temporary files; nothing is made yet."""
    root = Path(tempfile.gettempdir()) if root is None else root
    return root.absolute() / f"pxd-executor-{secrets.token_hex(8)}"


def own_directory() -> Path:
    """This executor's directory, made at first use; where it was given none, that of all temporary
    files. Raises `OSError`."""
    directory = Path(os.environ.get(VARIABLE) or tempfile.gettempdir())
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def remove(directory: Path) -> None:
    """With all that is in it; it need not be there."""
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s cannot be removed: %s", directory, error)
