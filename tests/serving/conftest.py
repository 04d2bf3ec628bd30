"""Fixtures of the serving tests."""

import pytest
import trio
from trio.testing import MockClock


def inline_clock(patch: pytest.MonkeyPatch) -> MockClock:
    """Virtual time, for as long as `patch` lasts, that does not leap while a thread works."""

    async def inline(call, *arguments, **options):
        await trio.lowlevel.checkpoint()
        return call(*arguments)

    patch.setattr(trio.to_thread, "run_sync", inline)
    return MockClock(autojump_threshold=0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MockClock:
    """Virtual time that does not leap while a thread works."""
    return inline_clock(monkeypatch)
