"""Plans for nodes that keep failing at a model, and for those that are slower than usual."""

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pxd.cluster.records import StageReport, Unfit
from pxd.serving.basis import inputs_of, left_out
from tests.planning.clusters import model_of

from .conftest import inline_clock
from .leader import Leader, Models, description, nodes
from .test_basis import member

DYING = Unfit("sums", "its executor keeps dying")


def serving(leader: Leader) -> list[list[str]]:
    return [sorted(chain) for chain in nodes(leader.model().pipelines)]


async def test_others_serve_what_a_node_keeps_failing_at(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    await leader.run_for(60)
    leader.obey()
    leader.record("b", unfit=(DYING,))
    await leader.run_for(60)
    assert serving(leader) == [["a", "c"]]
    leader.obey()
    await leader.run_for(60)
    assert leader.model().retiring == ()
    leader.record("b", unfit=())
    await leader.run_for(60)
    assert serving(leader) == [["a", "c"]]


async def test_a_node_may_serve_another_model_than_that(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    leader.record("b", unfit=(Unfit("other", "no such file"),))
    await leader.run_for(60)
    assert serving(leader) == [["a", "b"]]


async def test_where_nobody_else_can_it_goes_on_and_the_plan_says_why(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8)
    await leader.run_for(60)
    before = serving(leader)
    leader.obey()
    leader.record("b", unfit=(DYING,))
    await leader.run_for(60)
    model = leader.model()
    assert (model.state, model.pipelines) == ("waiting", ())
    assert [sorted(chain) for chain in nodes(model.retiring)] == before
    assert "b is left out: its executor keeps dying" in model.reason
    leader.record("b", unfit=())
    await leader.run_for(60)
    assert serving(leader) == before
    assert leader.model().retiring == ()


async def test_a_long_look_at_a_model_does_not_hold_up_what_a_death_calls_for(
    clock: MockClock,
) -> None:
    models = Models(description)
    models.takes_s = {"slow": 600}
    leader = Leader(models, a=8, b=8, c=8)
    await leader.run_for(60)
    assert serving(leader) == [["a", "b"]]
    leader.obey()
    leader.choose("sums", "slow")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leader.run_for, 900)
        await trio.sleep(60)
        assert leader.states() == {"sums": "planned"}
        leader.cluster.members["b"].state = "dead"
        leader.changed.notify()
        await trio.sleep(5)
        assert serving(leader) == [["a", "c"]]
        assert leader.states() == {"sums": "planned", "slow": "waiting"}
        leader.obey()
        await trio.sleep(700)
        assert models.calls > 2
        assert "it is looked at once" not in leader.model("slow").reason


def test_who_is_away_anyway_is_not_named() -> None:
    members = {
        "a": member("a", unfit=(DYING,)),
        "b": member("b", "dead", unfit=(DYING,)),
        "c": member("c", unfit=(Unfit("other", "no such file"),)),
    }
    assert left_out("sums", members) == "a is left out: its executor keeps dying"


async def test_a_slow_node_is_replanned_around_and_not_taken_back_at_once(
    clock: MockClock,
) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    await leader.run_for(60)
    assert serving(leader) == [["a", "b"]]
    leader.obey()
    leader.record("b", slow=6.0)
    await leader.run_for(60)
    assert serving(leader) == [["a", "c"]]
    leader.obey()
    await leader.run_for(60)
    count = len(leader.plans)
    for slow in (7.0, 3.0, 0.0):
        leader.record("b", slow=slow)
        await leader.run_for(60)
    assert len(leader.plans) == count


async def test_a_node_that_is_needed_stays_however_slow(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8)
    await leader.run_for(60)
    leader.obey()
    leader.record("b", slow=50.0)
    await leader.run_for(60)
    assert [sorted(chain) for chain in nodes(leader.model().pipelines)] == [["a", "b"]]


def test_a_slow_node_has_the_figures_that_it_has_now() -> None:
    report = StageReport(
        model="m", pipeline="p", start=0, end=2, state="ready", decode_s=0.1, prefill_s=0.01
    )
    behind = msgspec.structs.replace(report, slow=4.0)
    members = (
        member("a", slow=4.0, stages=(behind,)),
        member("b", slow=4.0, stages=(report,)),
        member("c", slow=4.0),
        member("d", stages=(report,)),
    )
    inputs = inputs_of("m", model_of(4), {each.record.id: each for each in members})
    offers = {offer.id: offer for offer in inputs.offers}
    assert [offer.slow for offer in inputs.offers] == [True, True, True, False]
    figures = [offer.measured and offer.measured.decode_s for offer in inputs.offers]
    assert figures == [0.4, 0.1, None, 0.1]
    assert offers["a"].measured is not None
    assert offers["a"].measured.prefill_s == 0.04


Marks = list[tuple[str, float]]


def follow(marks: Marks) -> None:
    async def main() -> None:
        leader = Leader(Models(description), a=8, b=8, c=8, d=8)
        await leader.run_for(60)
        slow: dict[str, float] = {}
        for name, factor in marks:
            leader.obey("ready", a=0, b=0, c=0, d=0)
            await leader.run_for(120)
            changed = (slow.get(name, 0.0) > 0) != (factor > 0)
            slow[name] = factor
            count, before = len(leader.plans), leader.model().pipelines
            leader.record(name, slow=factor)
            await leader.run_for(60)
            moved = before != leader.model().pipelines
            assert len(leader.plans) <= count + 1
            assert changed or not moved, "only another set of slow nodes moves anything"
        leader.obey("ready", a=0, b=0, c=0, d=0)
        await leader.run_for(120)
        count = len(leader.plans)
        await leader.run_for(3600)
        assert len(leader.plans) == count

    with pytest.MonkeyPatch.context() as patch:
        trio.run(main, clock=inline_clock(patch))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([0.0, 3.0, 8.0])), max_size=8))
def test_plans_do_not_flap_whoever_is_slow_when(marks: Marks) -> None:
    follow(marks)
