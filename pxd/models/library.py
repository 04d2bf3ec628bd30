"""Where the models are on this machine. Everything here blocks."""

from collections.abc import Iterator
from pathlib import Path

from pxd.models import catalog
from pxd.models.chat import TOKENIZERS
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.kept import LABEL, Store


class Library:
    """Directories that people have put here, the hub's cache, and below `root` what has come from
    other nodes."""

    def __init__(self, root: Path) -> None:
        self.store = Store(root / "models")
        self.digests = root / "digests"

    def find(self, name: str, fingerprint: str = "", revision: str = "") -> Path | None:
        """A directory that has at least configuration, tokenizer and layout of the model; with a
        fingerprint, of that one only. Of the hub's commits, `revision` comes first."""
        for directory in self._places(name, fingerprint, revision):
            if _checkpoint(directory, fingerprint) is not None and _usable(directory):
                return directory
        return None

    def find_layers(
        self, name: str, fingerprint: str, start: int, end: int | None, revision: str = ""
    ) -> Path | None:
        """A directory that has all that a stage of layers [start, end) needs, the last for None."""
        for directory in self._places(name, fingerprint, revision):
            checkpoint = _checkpoint(directory, fingerprint)
            if checkpoint is not None:
                tensors = checkpoint.tensors_for(start, checkpoint.layers if end is None else end)
                files = {checkpoint.shards[tensor] for tensor in tensors}
                if not tensors & checkpoint.absent and not files & set(checkpoint.missing):
                    return directory
        return None

    def _places(self, name: str, fingerprint: str, revision: str) -> Iterator[Path]:
        places = [self.elsewhere(name, revision) if revision else None, self.elsewhere(name)]
        yield from (place for place in places if place is not None)
        kept = self.store.find(name, fingerprint)
        if kept is not None:
            yield kept

    def elsewhere(self, name: str, revision: str = "") -> Path | None:
        """Where a model's files are that did not come from other nodes."""
        try:
            return catalog.cached_directory(name, revision)
        except ModelError:
            return None

    def revision(self, name: str, directory: Path) -> str:
        """The commit by which the hub calls what is in `directory`, where that is known."""
        if (directory / LABEL).is_file():
            return self.store.label(directory).revision
        return catalog.revision_of(directory) if catalog.is_hub_id(name) else ""


def _usable(directory: Path) -> bool:
    """Other programs put single files into the hub's cache, too."""
    return not catalog.revision_of(directory) or any(
        any(directory.glob(pattern)) for pattern in TOKENIZERS
    )


def _checkpoint(directory: Path, fingerprint: str) -> Checkpoint | None:
    try:
        found = describe_checkpoint(directory)
    except ModelError:
        return None
    return found if fingerprint in ("", found.fingerprint) else None
