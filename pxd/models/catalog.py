"""From a model's name to a directory: the bundled demo, a local path, or a hub id.

Everything here blocks and belongs into a worker thread. The hub's own settings hold: HF_HOME,
HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE.
"""

import errno
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pxd.models.describe import INDEX_NAME, describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.manifest import METADATA

log = logging.getLogger("pxd.models")

DEMO = "demo"
DEMO_DIRECTORY = Path(__file__).parent / "demo"

Progress = Callable[[float], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_WEIGHTS = "model*.safetensors"


def fetch_metadata(name: str, progress: Progress = lambda _: None, revision: str = "") -> Path:
    """Return a directory with at least configuration, tokenizer and index of the model; of a hub
    id, what its main branch holds now unless a `revision` is given.

    Weights that are one file without an index are fetched too: nothing else tells their layout,
    and every node needs that file anyway. Raises `ModelError`.
    """
    directory = local_directory(name)
    if directory is not None:
        return directory
    with _hub_errors(name):
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        directory = Path(
            snapshot_download(name, revision=revision or None, allow_patterns=list(METADATA))
        )
        if not (directory / "config.json").is_file():
            raise ModelError(f"the hub's {name} has no config.json; is this a language model?")
        if not (directory / INDEX_NAME).is_file():
            _fetch_files(name, directory, _weight_files(name, directory), progress)
    return directory


def fetch_layers(
    name: str,
    start: int,
    end: int | None,
    progress: Progress = lambda _: None,
    revision: str = "",
) -> Path:
    """Return a directory with at least the files that a stage of layers [start, end) needs, up to
    the last one for None.

    `progress` gets what part is there, 0 to 1. If it raises, fetching stops. Raises `ModelError`.
    """
    directory = fetch_metadata(name, progress, revision)
    checkpoint = describe_checkpoint(directory)
    last = checkpoint.layers if end is None else end
    wanted = [file for file in checkpoint.files_for(start, last) if file in checkpoint.missing]
    if wanted and local_directory(name) is not None:
        raise ModelError(f"{directory} has no {wanted[0]}, which its {INDEX_NAME} names")
    if wanted:
        with _hub_errors(name):
            _fetch_files(name, directory, wanted, progress)
    progress(1.0)
    return directory


def cached_directory(name: str, revision: str = "") -> Path | None:
    """Where a model's files are on this machine, whole or in part; None for a hub id of which
    nothing has been fetched. Asks no hub. Raises `ModelError` like `local_directory`."""
    directory = local_directory(name)
    if directory is not None:
        return directory
    from huggingface_hub import try_to_load_from_cache

    # It refuses some names that look like the hub's.
    with _hub_errors(name):
        config = try_to_load_from_cache(name, "config.json", revision=revision or None)
    return Path(config).parent if isinstance(config, str) else None


def revision_of(directory: Path) -> str:
    """The commit of the hub that a directory of its cache is a snapshot of; else empty."""
    return directory.name if directory.parent.name == "snapshots" else ""


def is_hub_id(name: str) -> bool:
    """Whether a name that is no directory here can be one of the hub's."""
    return name != DEMO and _HUB_ID.fullmatch(name) is not None and ".." not in name


def local_directory(name: str) -> Path | None:
    """The directory of a model that needs no hub; None for a hub id. Raises `ModelError`."""
    if name == DEMO:
        return DEMO_DIRECTORY
    # The name may come from another machine: what is a path there need not be readable here.
    try:
        path = Path(name).expanduser()
        is_directory = bool(name) and path.is_dir()
        has_config = is_directory and (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{name!r} cannot be read on this machine: {error}") from error
    if is_directory:
        if not has_config:
            raise ModelError(f"{path} has no config.json, so it is no model in Hugging Face layout")
        return path.resolve()
    if is_hub_id(name):
        return None
    raise ModelError(
        f"there is no model {name!r}: it is neither {DEMO!r}, nor a directory on this machine, "
        "nor a hub id such as Qwen/Qwen3-0.6B"
    )


def _weight_files(name: str, directory: Path) -> list[str]:
    present = [path.name for path in directory.glob(_WEIGHTS)]
    if present:
        return present
    from huggingface_hub import HfApi

    files = HfApi().list_repo_files(name, revision=directory.name)
    weights = [file for file in files if Path(file).match(_WEIGHTS) and "/" not in file]
    if not weights:
        raise ModelError(
            f"the hub's {name} has no {_WEIGHTS}; choose a repository with safetensors weights"
        )
    return weights


def _fetch_files(name: str, directory: Path, files: list[str], progress: Progress) -> None:
    """Fetch files of the very revision that `directory` is the snapshot of."""
    from huggingface_hub import hf_hub_download

    for done, file in enumerate(files):
        log.info("fetching %s of %s (%d of %d)", file, name, done + 1, len(files))

        def within(part: float, done: int = done) -> None:
            progress((done + part) / len(files))

        hf_hub_download(name, file, revision=directory.name, tqdm_class=_meter(within))


def _meter(report: Progress) -> Any:
    """A progress bar class that shows nothing and calls `report` with what part is done."""
    from huggingface_hub.utils import tqdm

    class Meter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._total = kwargs.get("total") or 0
            self._done = kwargs.get("initial") or 0
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += n or 0
            if self._total:
                report(min(self._done / self._total, 1.0))

    return Meter


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn whatever the hub client raises into a `ModelError` that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{name} is gated: accept its terms on the hub's page of it, "
            "then set HF_TOKEN to a token of that account"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"the hub has no model {name}, or it is private: check the spelling, "
            "or set HF_TOKEN to a token that may read it"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name} is not complete in the local cache and the hub cannot be reached: "
            "connect this machine (and unset HF_HUB_OFFLINE), or name a local directory instead"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"no space left for {name}: free some, or set HF_HOME to a larger disk"
            ) from error
        raise ModelError(f"{name} could not be fetched: {error}") from error
    except errors.HFValidationError as error:
        raise ModelError(f"{name} is no hub id: {error}") from error
    except Exception as error:
        # Its transports raise what they like, and a broken download must not end the daemon.
        raise ModelError(f"{name} could not be fetched: {type(error).__name__}: {error}") from error
