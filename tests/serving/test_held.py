"""What a node's record says of the models it serves."""

import pytest
import trio

from pxd.cluster.records import HeldModel
from pxd.models.errors import ModelError
from pxd.serving import held
from pxd.serving.held import Held
from pxd.serving.signal import Signal


async def test_the_record_follows_what_is_served(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mark(name: str) -> str:
        if name == "broken":
            raise ModelError("cannot be read")
        return f"mark of {name}"

    monkeypatch.setattr(held, "fingerprint", mark)
    served: list[str] = []
    told: list[tuple[HeldModel, ...]] = []
    published = trio.Event()

    def publish(models: tuple[HeldModel, ...]) -> None:
        nonlocal published
        told.append(models)
        published.set()

    changed = Signal()
    nursery.start_soon(Held(lambda: served, publish).run, changed)
    await trio.testing.wait_all_tasks_blocked()
    assert told == []

    async def now(*names: str) -> tuple[HeldModel, ...]:
        nonlocal published
        published = trio.Event()
        served[:] = names
        changed.notify()
        with trio.fail_after(10):
            await published.wait()
        return told[-1]

    assert await now("demo", "demo", "broken") == (
        HeldModel("broken", ""),
        HeldModel("demo", "mark of demo"),
    )
    changed.notify()
    await trio.testing.wait_all_tasks_blocked()
    assert len(told) == 1
    assert await now() == ()
