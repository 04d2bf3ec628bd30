"""Fixtures of the serving tests."""

import pytest
import trio
from trio.testing import MockClock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """Virtual time that does not leap while a thread works."""

    async def inline(call, *arguments, **options):
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    return MockClock(autojump_threshold=0)
