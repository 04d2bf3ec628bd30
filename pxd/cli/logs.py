"""Where a daemon's log goes and what a line of it looks like."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal


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


def set_up(kind: Literal["text", "json"]) -> None:
    """Log to stderr: pxd from INFO on, libraries from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("pxd").setLevel(logging.INFO)
    # It shows a stack for every packet that an interface which went away does not take.
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    logging.captureWarnings(capture=True)
