"""The table of architectures against mlx-lm as it is installed, and against dry runs of them all.

That stages compute what the whole model does is `scripts/architectures`' work, and for some of the
architectures `test_architectures.py`'s.
"""

import subprocess
import sys
from importlib.metadata import version

import msgspec
import pytest

from tests.executors.architecture_table import (
    ROOT,
    TABLE,
    Row,
    architectures,
    cells,
    lines_of,
    render,
)
from tests.tiny_configs import CONFIGS

TIMEOUT_S = 300


def test_every_architecture_has_a_row() -> None:
    names = architectures()
    assert len(names) > 100
    assert set(names) <= set(CONFIGS), "tests/tiny_configs.py lacks some"
    table = TABLE.read_text()
    assert set(cells(table)) == set(names), "run scripts/architectures"
    assert f"mlx-lm {version('mlx-lm')} " in table, "run scripts/architectures"


def test_what_is_written_can_be_read() -> None:
    some = Row(name="a", layers=6, cuts=(2, 4), batches=True)
    every = Row(name="b", layers=3, cuts=(1, 2), guesses=True)
    none = Row(name="c", layers=3, cuts=(), reason="it crosses a|b")
    never = Row(name="d", reason="no code")
    rows = {row.name: row.line for row in (never, some, none, every)}
    table = render(rows)
    assert list(lines_of(table).values()) == [row.line for row in (some, every, none, never)]
    assert cells(table) == {
        "a": ["2, 4 of 6", "yes", "-", "-", ""],
        "b": ["any layer", "-", "-", "yes", ""],
        "c": ["nowhere", "-", "-", "-", r"it crosses a\|b"],
        "d": ["does not run", "-", "-", "-", "no code"],
    }


@pytest.mark.slow
def test_dry_runs_find_the_cuts_that_the_table_tells() -> None:
    """All of them, in a process of their own; nothing is loaded or computed."""
    command = [sys.executable, "-m", "tests.without_torch", "tests.executors.architecture_dry_run"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = msgspec.json.decode(done.stdout.splitlines()[-1], type=dict[str, str])
    told = {name: columns[0] for name, columns in cells(TABLE.read_text()).items()}
    assert found == told, "run scripts/architectures"
