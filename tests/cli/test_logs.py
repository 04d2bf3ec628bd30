"""The daemon's log: what peers do can neither forge its lines nor fill the disk with them."""

import io
import logging

import pytest

from pxd.cli.logs import BURST, TextFormatter, Throttle


class Log:
    def __init__(self) -> None:
        self.now = 0.0
        self._written = io.StringIO()
        handler = logging.StreamHandler(self._written)
        handler.addFilter(Throttle(lambda: self.now))
        handler.setFormatter(TextFormatter())
        self.logger = logging.Logger("pxd.test")
        self.logger.addHandler(handler)

    @property
    def lines(self) -> list[str]:
        return self._written.getvalue().splitlines()


@pytest.fixture
def log() -> Log:
    return Log()


def test_one_place_logs_so_much_and_says_what_it_left_out(log: Log) -> None:
    for number in range(10_000):
        log.logger.warning("a frame of %s", number)
    assert len(log.lines) == BURST
    log.logger.warning("something else")
    assert log.lines[-1].endswith("something else")
    for number in range(2):
        log.now += 60.0
        for _ in range(2 - number):
            log.logger.warning("again")
    assert len(log.lines) == BURST + 4


def test_what_was_left_out_is_counted(log: Log) -> None:
    def complain(number: int) -> None:
        log.logger.warning("a frame of %s", number)

    for number in range(1000):
        complain(number)
    log.now += 1.0
    complain(1000)
    assert log.lines[-1].endswith("a frame of 1000 [900 more like it not shown]")
    log.now += 1.0
    complain(1001)
    assert log.lines[-1].endswith("a frame of 1001")


def test_a_message_is_one_line(log: Log) -> None:
    log.logger.warning("from %s", "x\n2026-11-21 10:00:30.123 WARNING pxd.node: forged\x1b[2J")
    [line] = log.lines
    assert "forged" in line
    assert "\x1b" not in line
