"""What a node's record says of the models that it has files of."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.records import HeldModel
from pxd.models.errors import ModelError
from pxd.serving import held
from pxd.serving.held import LOOK_AGAIN_S, Held
from pxd.serving.signal import Signal


async def test_the_record_follows_what_is_here(
    clock: MockClock, nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(directory: Path) -> str:
        if directory.name == "broken":
            raise ModelError("cannot be read")
        return f"mark of {directory.name}"

    monkeypatch.setattr(held, "fingerprint", mark)
    wanted: list[str] = []
    here = {"demo", "broken"}
    told: list[tuple[HeldModel, ...]] = []
    changed = Signal()
    record = Held(lambda: wanted, lambda n: tmp_path / n if n in here else None, told.append)
    nursery.start_soon(record.run, changed)

    async def now(*names: str) -> list[tuple[HeldModel, ...]]:
        told.clear()
        wanted[:] = names
        changed.notify()
        await trio.sleep(1)
        return told

    assert await now() == []
    both = (HeldModel("broken", ""), HeldModel("demo", "mark of demo"))
    assert await now("demo", "demo", "broken", "absent") == [both]
    assert await now("demo", "broken", "absent") == []
    here.add("absent")
    await trio.sleep(LOOK_AGAIN_S)
    assert told == [(HeldModel("absent", "mark of absent"), *both)]
    assert await now() == [()]


async def test_what_was_deleted_is_told_no_more(
    clock: MockClock, nursery: trio.Nursery, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held, "fingerprint", lambda _: "mark")
    here = {"demo"}
    told: list[tuple[HeldModel, ...]] = []
    changed = Signal()
    record = Held(lambda: ["demo"], lambda n: tmp_path if n in here else None, told.append)
    nursery.start_soon(record.run, changed)
    await trio.sleep(1)
    here.clear()
    record.forget()
    changed.notify()
    await trio.sleep(1)
    assert told == [(HeldModel("demo", "mark"),), ()]
