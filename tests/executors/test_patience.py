"""How long a worker may be silent."""

from hypothesis import given
from hypothesis import strategies as st

from pxd.executors.patience import FACTOR, LEAST_S, MOST_S, Patience

steps = st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(0, 1000)), max_size=30)


def test_before_anything_is_known_it_is_long() -> None:
    assert Patience().limit(1) == MOST_S
    assert Patience().limit(4096) == MOST_S


def test_it_grows_with_the_step() -> None:
    patience = Patience()
    patience.took(1, 0.05)
    assert patience.limit(1) == LEAST_S
    assert patience.limit(40) == 0.05 * 32 * FACTOR
    assert patience.limit(4096) == MOST_S


def test_a_figure_of_the_same_size_counts_more_than_one_of_another() -> None:
    patience = Patience()
    patience.took(1, 0.05)
    patience.took(2048, 4.0)
    assert patience.limit(2048) == 4.0 * FACTOR
    assert patience.limit(4096) == 8.0 * FACTOR
    assert patience.limit(1) == LEAST_S


def test_it_learns_at_once_that_steps_take_longer_and_forgets_it_slowly() -> None:
    patience = Patience()
    patience.took(1, 0.01)
    patience.took(1, 5.0)
    assert patience.limit(1) == 100.0
    for _ in range(1000):
        patience.took(1, 0.01)
    assert patience.limit(1) == LEAST_S


def test_a_step_without_rows_says_nothing() -> None:
    patience = Patience()
    patience.took(0, 0.0001)
    assert patience.limit(1) == MOST_S


@given(steps, st.integers(0, 1 << 20))
def test_no_step_as_usual_is_ever_taken_for_a_hang(
    known: list[tuple[int, float]], positions: int
) -> None:
    patience = Patience()
    for size, seconds in known:
        patience.took(size, seconds)
    limit = patience.limit(positions)
    assert LEAST_S <= limit <= MOST_S
    latest = {size.bit_length(): seconds for size, seconds in known if size}
    usual = latest.get(max(1, positions).bit_length(), 0.0)
    assert limit >= min(usual * FACTOR, MOST_S)


@given(steps, st.integers(1, 1 << 20), st.integers(1, 1 << 20))
def test_without_figures_of_its_size_a_larger_step_may_take_longer(
    known: list[tuple[int, float]], one: int, other: int
) -> None:
    patience = Patience()
    sizes = {one.bit_length(), other.bit_length()}
    for size, seconds in known:
        if size.bit_length() not in sizes and size.bit_length() < min(sizes):
            patience.took(size, seconds)
    small, large = sorted((one, other))
    assert patience.limit(small) <= patience.limit(large)
