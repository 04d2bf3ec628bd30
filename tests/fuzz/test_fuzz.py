"""A short run of the fuzzer over every parser; `scripts/fuzz` makes a long one."""

import logging

import pytest

from tests.fuzz.mutate import Mutator
from tests.fuzz.targets import Target, all_targets

INPUTS = 400
TARGETS = all_targets()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_examples_are_accepted(target: Target) -> None:
    for example in target.examples:
        target.parse(example)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_nothing_but_a_refusal(target: Target) -> None:
    mutator = Mutator(1, target.examples)
    refused = 0
    for _ in range(INPUTS):
        data = mutator.next()
        try:
            target.parse(data)
        except target.refusals:
            refused += 1
        except Exception as error:
            raise AssertionError(f"{target.name} fails for {data!r}") from error
    assert refused or not target.refusals
