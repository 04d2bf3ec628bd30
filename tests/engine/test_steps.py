"""`scripts/steps` and the padded-batch policy: the step tables, and its rules on any scenario."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.engine.padded import Padded, PaddedConfig
from pxd.engine.scheduler import NeverFits, NewRequest, PlannedStep, Scheduler
from pxd.wire import SampledToken, Sampling

ROOT = Path(__file__).parents[2]
TABLES = Path(__file__).parent / "data" / "scheduler_steps.json"
SCENARIOS = json.loads(TABLES.read_text())["scenarios"]
BLOCK = 64


def steps(file: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "scripts" / "steps.py"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def lines() -> dict[tuple[str, int], dict[str, Any]]:
    done = steps(TABLES)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({(line["scenario"], line["step"]) for line in found}) == len(found)
    return {(line["scenario"], line["step"]): line for line in found}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario["name"])
def test_every_checked_step_is_reproduced(lines: dict[Any, Any], scenario: dict[str, Any]) -> None:
    for checked in scenario["checked_steps"]:
        line = lines[scenario["name"], checked["step"]]
        expected = {key: checked[key] for key in line if key != "scenario"}
        assert {key: line[key] for key in expected} == expected


def test_a_request_that_never_fits_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    scenario = {
        "name": "s",
        "max_num_seqs": 2,
        "max_model_len": 128,
        "prompts_lengths": [200, 10, 70],
        "seqs_max_tokens": [5, 2, 20],
        "steps_add_reqs": [0, 0, 0],
    }
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"scenarios": [scenario]}))
    done = steps(file)
    assert done.returncode == 0
    # The last one would fit only into a batch that is not yet beyond its prompt, and none is.
    assert "request 0 is refused" in done.stderr
    assert "request 2 is refused: it does not fit into an empty batch" in done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["tkv"], last["waiting"], last["running"]) == (0, [], [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "Expected `object`"),
        ('{"scenarios": [{"name": "s"}]}', "missing required field"),
        (
            '{"scenarios": [{"name": "s", "max_num_seqs": 1, "max_model_len": 9, '
            '"prompts_lengths": [1], "seqs_max_tokens": [1], "steps_add_reqs": []}]}',
            "unlike length",
        ),
    ],
)
def test_files_that_make_no_sense_are_refused(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    done = steps(file)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())


class Batch:
    """Restates what a step does to the batch, from the rules alone."""

    def __init__(self) -> None:
        self.prompts: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    def run(self, step: PlannedStep) -> list[SampledToken]:
        if step.openings:
            assert len(step.rows) == 1, "a prefill is alone in its step"
            assert step.rows[0].position == 0
        for row in step.rows:
            self.tokens[row.request] = self.tokens.get(row.request, 0) + 1
        if not step.openings and step.rows:
            assert all(row.count == 1 for row in step.rows)
        return [SampledToken(row.request, row.position + row.count, 0) for row in step.rows]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 150), st.integers(1, 80), st.integers(0, 40)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
    st.integers(2, 5),
    st.none() | st.integers(2, 14),
    st.none() | st.integers(128, 900),
)
def test_the_bounds_hold_in_every_step_of_any_scenario(
    requests: list[tuple[int, int, int]],
    most: int,
    length_blocks: int,
    blocks: int | None,
    volume: int | None,
) -> None:
    config = PaddedConfig(
        max_running=most,
        max_model_len=length_blocks * BLOCK,
        available_blocks=blocks,
        max_batch_tkv=volume,
    )
    policy = Padded(config)
    scheduler = Scheduler(policy)
    batch = Batch()
    wanted, refused = {}, 0
    for time in range(4000):
        step = scheduler.next_step()
        refused += len(scheduler.take_refused())
        results = scheduler.step_done(step.number, batch.run(step)) if step else []
        running = scheduler.running + sum(result.finish is not None for result in results)
        assert running <= most
        assert policy.used <= policy.reserved
        assert policy.tkv <= config.max_model_len
        assert blocks is None or policy.reserved <= blocks
        assert volume is None or running * policy.tkv <= volume
        for number, (prompt, new, arrival) in enumerate(requests):
            if arrival == time:
                try:
                    scheduler.add(
                        NewRequest(
                            number=number,
                            tokens=[0] * prompt,
                            max_new=new,
                            sampling=Sampling(temperature=0),
                        )
                    )
                    wanted[number] = new
                except NeverFits:
                    refused += 1
        if time > 40 and not scheduler.requests and policy.tkv == 0:
            break
    assert not scheduler.requests, "somebody waits for ever"
    assert len(batch.tokens) + refused == len(requests)
    assert all(batch.tokens[number] == wanted[number] for number in batch.tokens)
