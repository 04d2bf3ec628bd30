from hypothesis import given
from hypothesis import strategies as st

from pxd.planning.classic.waterfill import water_fill, water_levels

nodes = st.lists(st.tuples(st.integers(0, 40), st.floats(0.01, 1000)), min_size=1, max_size=12)


def test_equal_nodes_share_equally() -> None:
    assert water_fill([100, 100, 100], [5.0, 5.0, 5.0], 9) == [3, 3, 3]


def test_ties_go_to_the_first() -> None:
    assert water_fill([100, 100, 100], [5.0, 5.0, 5.0], 10) == [4, 3, 3]


def test_shares_follow_compute() -> None:
    assert water_fill([100, 100], [30.0, 10.0], 8) == [6, 2]


def test_what_a_full_node_cannot_take_goes_to_the_others() -> None:
    assert water_fill([3, 100, 100], [1000.0, 1.0, 1.0], 9) == [3, 3, 3]


def test_a_slow_node_gets_nothing_unless_promised() -> None:
    assert water_fill([100, 100], [1000.0, 1.0], 4) == [4, 0]
    assert water_fill([100, 100], [1000.0, 1.0], 4, minimum=1) == [3, 1]


def test_too_little_capacity() -> None:
    assert water_fill([2, 3], [1.0, 1.0], 6) is None


def test_more_promises_than_layers() -> None:
    assert water_fill([5, 5, 5], [1.0, 1.0, 1.0], 2, minimum=1) is None


@given(nodes, st.data())
def test_exact_within_bounds_and_next_to_the_level(
    given_nodes: list[tuple[int, float]], data: st.DataObject
) -> None:
    capacities = [capacity for capacity, _ in given_nodes]
    compute = [speed for _, speed in given_nodes]
    minimum = data.draw(st.integers(0, 2))
    promised = sum(min(minimum, capacity) for capacity in capacities)
    layers = data.draw(st.integers(promised, sum(capacities)))
    counts = water_fill(capacities, compute, layers, minimum)
    levels = water_levels(capacities, compute, layers, minimum)
    assert counts is not None
    assert levels is not None
    assert sum(counts) == layers
    for count, level, capacity in zip(counts, levels, capacities, strict=True):
        assert min(minimum, capacity) <= count <= capacity
        assert abs(count - level) <= 1 + 1e-6


@given(nodes)
def test_among_nodes_with_room_the_faster_never_gets_less(
    given_nodes: list[tuple[int, float]],
) -> None:
    compute = [speed for _, speed in given_nodes]
    layers = 17
    counts = water_fill([layers] * len(compute), compute, layers)
    assert counts is not None
    for i, speed in enumerate(compute):
        for j, other in enumerate(compute):
            if speed > other * 1.0001:
                assert counts[i] >= counts[j] - (1 if abs(speed - other) < 1e-6 else 0)
