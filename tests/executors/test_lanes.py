"""How requests are spread over what can compute side by side."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.executors.mlx.batch import Batch, Request
from pxd.executors.mlx.lanes import Pace, spread


def requests(batches: list[int]) -> list[Request]:
    """One for each number; those of the same number, unless it is 0, share a batch."""
    made: dict[int, Batch] = {}
    found = []
    for number, place in enumerate(batches):
        request = Request(number, None, [])
        if place:
            request.batch = made.setdefault(place, Batch([]))
            request.batch.members.append(request)
        found.append(request)
    return found


def numbers(groups: list[list[Request]]) -> list[list[int]]:
    return [sorted(request.number for request in group) for group in groups]


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 8))
def test_everybody_is_in_one_group_and_the_groups_are_even(batches: list[int], lanes: int) -> None:
    groups = spread(requests(batches), lanes)
    assert sorted(n for group in numbers(groups) for n in group) == list(range(len(batches)))
    assert len(groups) == min(lanes, len(batches))
    sizes = [len(group) for group in groups]
    assert not sizes or max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(0, 4), max_size=40), st.integers(1, 8))
def test_what_was_spread_stays_where_it_is(batches: list[int], lanes: int) -> None:
    found = requests(batches)
    groups = spread(found, lanes)
    for group in groups:
        for request in group:
            request.batch = None
        if len(group) > 1:
            batch = Batch([])
            batch.members = list(group)
            for request in group:
                request.batch = batch
    again = spread(found[::-1], lanes)
    assert sorted(numbers(again)) == sorted(numbers(groups))


def test_a_newcomer_moves_nobody() -> None:
    found = requests([1, 1, 2, 0])
    assert numbers(spread(found, 2)) == [[0, 1], [2, 3]]


def test_who_leaves_moves_as_few_as_needed() -> None:
    assert numbers(spread(requests([1, 1, 1, 1, 2, 2]), 2)) == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("pace", "rows", "lanes"),
    [
        (Pace(begin=0.008, row=0.0005), 8, 1),
        (Pace(begin=0.013, row=0.038), 1, 1),
        (Pace(begin=0.013, row=0.038), 2, 2),
        (Pace(begin=0.013, row=0.115), 8, 8),
        (Pace(begin=0.013, row=0.115), 40, 16),
        (Pace(begin=0.013, row=0.0), 8, 1),
        (Pace(begin=0.0, row=0.1), 8, 8),
    ],
)
def test_passes_are_divided_as_far_as_it_pays(pace: Pace, rows: int, lanes: int) -> None:
    assert pace.lanes_for(rows, 16) == lanes
    assert pace.lanes_for(rows, 1) == 1
