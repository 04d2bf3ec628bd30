"""When a node leaves a model to others."""

from hypothesis import given
from hypothesis import strategies as st

from pxd.serving.fitness import DEATHS, FAILED_LOADS, PAUSES_S, SOUND_AFTER_S, WITHIN_S, Fitness

LAYERS = (0, 4)


def die(fitness: Fitness, times: int, start: float, every: float = 1.0) -> float:
    """Returns when it died last."""
    for number in range(times):
        fitness.died("m", LAYERS, start + number * every, "killed")
    return start + (times - 1) * every


def models(fitness: Fitness, now: float) -> list[str]:
    return [unfit.model for unfit in fitness.unfit(now)]


def test_deaths_that_are_close_together_and_of_one_stage_count() -> None:
    fitness = Fitness()
    now = die(fitness, DEATHS - 1, 0.0)
    fitness.died("m", (4, 8), now, "killed")
    fitness.died("other", LAYERS, now, "killed")
    assert models(fitness, now) == []
    fitness.died("m", LAYERS, now, "killed")
    assert models(fitness, now) == ["m"]
    [unfit] = fitness.unfit(now)
    assert "layers [0, 4) keeps dying: killed; it tries again in 1 min" in unfit.reason


def test_deaths_that_are_far_apart_do_not() -> None:
    fitness = Fitness()
    assert models(fitness, die(fitness, 50, 0.0, every=WITHIN_S / (DEATHS - 1) + 1)) == []


def test_loads_that_fail_count_too() -> None:
    fitness = Fitness()
    for number in range(FAILED_LOADS):
        assert models(fitness, 30.0 * number) == []
        fitness.load_failed("m", 30.0 * number, "no such file")
    assert "cannot load its layers: no such file" in fitness.unfit(60.0)[0].reason


def test_the_pause_grows_and_begins_anew_after_a_good_time() -> None:
    fitness, now, pauses = Fitness(), 0.0, []
    for _ in range(6):
        began = die(fitness, DEATHS, now)
        now = began
        while models(fitness, now):
            now += 1.0
        pauses.append(now - began)
    assert pauses == [*PAUSES_S, PAUSES_S[-1], PAUSES_S[-1]]
    now = die(fitness, DEATHS, now + SOUND_AFTER_S + 1)
    assert models(fitness, now + PAUSES_S[0] - 1) == ["m"]
    assert models(fitness, now + PAUSES_S[0]) == []


def test_deaths_during_the_pause_do_not_make_it_longer() -> None:
    fitness = Fitness()
    now = die(fitness, DEATHS, 0.0)
    die(fitness, 20, now)
    assert models(fitness, now + PAUSES_S[0]) == []


def test_a_person_may_end_the_pause() -> None:
    fitness = Fitness()
    now = die(fitness, DEATHS, 0.0)
    fitness.forgive()
    assert models(fitness, now) == []
    die(fitness, DEATHS - 1, now)
    assert models(fitness, now + DEATHS) == []


@given(st.lists(st.floats(0, 2000), min_size=1, max_size=400))
def test_however_it_fails_the_plan_changes_seldom(gaps: list[float]) -> None:
    fitness, now, changes, before = Fitness(), 0.0, 0, False
    for gap in gaps:
        now += gap
        if not fitness.unfit(now):
            fitness.died("m", LAYERS, now, "x" * 5000)
        unfit = bool(fitness.unfit(now))
        changes += unfit and not before
        before = unfit
        assert all(len(each.reason) <= 300 for each in fitness.unfit(now))
    assert changes <= len(PAUSES_S) + now / PAUSES_S[1]
