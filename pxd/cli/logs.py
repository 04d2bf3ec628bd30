"""Where a daemon's log goes and what a line of it looks like."""

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Literal

from pxd.cluster.allowance import Allowance

BURST = 100.0


class TextFormatter(logging.Formatter):
    """`2026-11-21 10:00:30.123 WARNING pxd.node: message`, with a message on one line."""

    default_msec_format = "%s.%03d"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        # Messages quote what peers say: they must not be able to forge further lines.
        record.message = "".join(c if c.isprintable() else repr(c)[1:-1] for c in record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """One JSON object a line; `time` is UTC, ISO 8601."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC)
        content = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


class Throttle(logging.Filter):
    """Lets each place in the code log `BURST` lines at once and one per second in the long run:
    what peers do is logged, and they must not be able to fill the disk."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._allowances: dict[tuple[str, int], Allowance] = {}
        self._withheld: Counter[tuple[str, int]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        allowance = self._allowances.setdefault(place, Allowance(1.0, BURST))
        if not allowance.take(self._clock()):
            self._withheld[place] += 1
            return False
        if withheld := self._withheld.pop(place, 0):
            record.msg = f"{record.getMessage()} [{withheld} more like it not shown]"
            record.args = ()
        return True


def set_up(kind: Literal["text", "json"]) -> None:
    """Log to stderr: pxd from INFO on, libraries from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(Throttle())
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("pxd").setLevel(logging.INFO)
    # It shows a stack for every packet that an interface which went away does not take.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
