"""What a daemon reads of itself before anything runs."""

from pathlib import Path

import pytest

from pxd import identity
from pxd.selfhood import identify
from pxd.settings import Settings


def test_a_full_disk_is_told_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, state: identity.State) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity, "write_state", full)
    with pytest.raises(identity.IdentityError, match=r"No space left on device; .*--data-dir"):
        identify(Settings(data_dir=tmp_path, name="anna", mdns=False))
