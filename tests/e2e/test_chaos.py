"""scripts/chaos itself: a short run that nothing may come of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

ROOT = Path(__file__).parents[2]


def test_a_short_run_is_answered_in_full(tmp_path: Path) -> None:
    written = tmp_path / "report.json"
    options = ("--minutes", "0.5", "--seed", "1", "--nodes", "3", "--clients", "4")
    command = [sys.executable, "-m", "scripts.chaos", *options, "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(written.read_text())
    assert report["finished"] > 0
    assert len(report["faults"]) > 1
    assert (report["wrong"], report["lost"], report["leaks"]) == ([], [], [])
