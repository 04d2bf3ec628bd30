"""Capacities against the reference's vectors."""

import math

import pytest

from pxd.planning.capacity import layer_capacity
from tests.planning.vectors import GPUS, KINDS, OTHER_SHARES, SHARES, VECTORS, model


def capacity(gpu: str, share: float, *, embedding: bool = False, head: bool = False) -> int:
    room = math.floor(GPUS[gpu]["num_gpus"] * GPUS[gpu]["memory_gb"] * 2**30 * share)
    return layer_capacity(room, model(8), embedding=embedding, head=head)


@pytest.mark.parametrize("gpu", KINDS)
def test_capacity_at_both_ends_of_the_model(gpu: str) -> None:
    share = SHARES.weight_share
    found = {
        "plain": capacity(gpu, share),
        "embed": capacity(gpu, share, embedding=True),
        "lm_head": capacity(gpu, share, head=True),
        "embed+lm_head(untied)": capacity(gpu, share, embedding=True, head=True),
    }
    assert found == VECTORS["capacities"][gpu]


def test_capacity_follows_the_weight_share() -> None:
    assert [capacity(gpu, OTHER_SHARES.weight_share) for gpu in KINDS] == [17, 8, 6, 5]
