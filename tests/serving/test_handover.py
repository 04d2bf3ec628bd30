"""From one plan to the next: what goes on, for how long, and what makes room for what."""

import msgspec
from trio.testing import MockClock

from pxd.cluster.plans import StagePlan, pipeline_id
from pxd.serving.audit import overcommitted
from pxd.serving.basis import PLAN_SETTINGS
from pxd.serving.handover import GRACE_S, LEAVE_GRACE_S, NEWS_S, STOP_GRACE_S, Handover

from .leader import GIB, Leader, Models, description, nodes


def small() -> object:
    return description(layers=6, layer_bytes=GIB // 4)


async def serving(leader: Leader) -> None:
    await leader.run_for(30)
    leader.obey()
    await leader.run_for(30)


async def test_a_drained_nodes_requests_end_where_they_are(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await serving(leader)
    assert nodes(leader.model().pipelines) == [["a"], ["b"]]
    leader.record("b", drained=True)
    await leader.run_for(5)
    assert nodes(leader.model().pipelines) == [["a"]]
    assert nodes(leader.model().retiring) == [["b"]]
    leader.obey(b=2)
    await leader.run_for(5)
    assert nodes(leader.model().retiring) == [["b"]]
    leader.obey(b=0)
    await leader.run_for(5)
    assert leader.model().retiring == ()
    # Resumed, it is a second pipeline again, and nothing happens to the first.
    leader.record("b", drained=False)
    await leader.run_for(5)
    assert nodes(leader.model().pipelines) == [["a"], ["b"]]


async def test_requests_that_do_not_end_are_moved_after_a_while(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await serving(leader)
    leader.record("b", drained=True)
    await leader.run_for(5)
    leader.obey(b=2)
    await leader.run_for(GRACE_S - 10)
    assert nodes(leader.model().retiring) == [["b"]]
    await leader.run_for(15)
    assert leader.model().retiring == ()


async def test_what_replaces_it_has_to_be_ready_first(clock: MockClock) -> None:
    """a, b -> a, c: b's pipeline goes on while c loads, although a holds its range twice."""
    leader = Leader(Models(small), a=3, b=3)
    await serving(leader)
    assert nodes(leader.model().pipelines) == [["a"], ["b"]]
    leader.add("c", 3)
    leader.record("a", drained=True)
    leader.record("b", drained=True)
    await leader.run_for(5)
    assert nodes(leader.model().pipelines) == [["c"]]
    assert nodes(leader.model().retiring) == [["a"], ["b"]]
    leader.obey("loading", a=0, b=0)
    await leader.run_for(300)
    assert nodes(leader.model().retiring) == [["a"], ["b"]]
    leader.obey(a=0, b=0)
    await leader.run_for(5)
    assert leader.model().retiring == ()


async def test_a_node_that_nobody_can_replace_goes_on(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8)
    await serving(leader)
    before = leader.model().pipelines
    leader.record("b", drained=True)
    await leader.run_for(300)
    assert leader.model().state == "waiting"
    assert leader.model().retiring == before
    leader.record("b", drained=False)
    await leader.run_for(5)
    assert (leader.model().pipelines, leader.model().retiring) == (before, ())


async def test_a_pipeline_that_lost_a_node_does_not_retire(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16, c=16)
    await serving(leader)
    leader.record("b", drained=True)
    leader.cluster.members["c"].state = "dead"
    await leader.run_for(5)
    assert nodes(leader.model().pipelines) == [["a"]]
    assert nodes(leader.model().retiring) == [["b"]]


async def test_who_waits_to_leave_is_kept_for_less_long(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await serving(leader)
    leader.record("b", leaving=True)
    await leader.run_for(5)
    leader.obey(b=2)
    await leader.run_for(LEAVE_GRACE_S - 7)
    assert nodes(leader.model().retiring) == [["b"]]
    await leader.run_for(5)
    assert leader.model().retiring == ()


async def test_a_swap_that_loads_nothing_waits_for_nothing(clock: MockClock) -> None:
    """c holds b's layers as a spare already, so a need not load its own a second time."""
    leader = Leader(Models(description), a=8, b=8, c=8)
    await serving(leader)
    [chain], [spare] = nodes(leader.model().pipelines), leader.model().spares
    replaced = next(
        stage.node
        for stage in leader.model().pipelines[0].stages
        if (stage.start, stage.end) == (spare.start, spare.end)
    )
    leader.record(replaced, drained=True)
    await leader.run_for(5)
    [after] = nodes(leader.model().pipelines)
    assert set(after) == {*chain, spare.node} - {replaced}
    assert leader.model().retiring == ()


async def test_a_spare_waits_for_the_memory_of_what_retires(clock: MockClock) -> None:
    leader = Leader(Models(description), a=10, b=10)
    await serving(leader)
    model = leader.model()
    spare = StagePlan("b", 0, 3, GIB)
    made = [msgspec.structs.replace(model, pipelines=model.pipelines[:1], spares=(spare,))]
    members, handover = leader.cluster.members, Handover(PLAN_SETTINGS)
    [during], _ = handover.arrange(made, leader.plan, members, 0.0)
    assert (nodes(during.retiring), during.spares) == ([["b"]], ())
    [after], _ = handover.arrange(made, leader.plan, members, GRACE_S)
    assert (nodes(after.retiring), after.spares) == ([], (spare,))


async def test_another_model_takes_over_once_it_serves(clock: MockClock) -> None:
    leader = Leader(Models(description, other=small), a=16)
    await serving(leader)
    leader.choose("other", outgoing=("sums",))
    await leader.run_for(5)
    assert leader.states() == {"sums": "outgoing", "other": "planned"}
    assert nodes(leader.model().retiring) == [["a"]]
    leader.obey("loading", a=3)
    await leader.run_for(300)
    assert leader.states() == {"sums": "outgoing", "other": "planned"}
    leader.obey(a=3)
    await leader.run_for(5)
    assert leader.states() == {"sums": "stopped", "other": "planned"}
    leader.obey(a=0)
    await leader.run_for(5)
    assert leader.states() == {"other": "planned"}


async def test_what_heads_said_before_a_model_was_stopped_does_not_end_it(clock: MockClock) -> None:
    """It had no requests a moment ago, and still took new ones."""
    leader = Leader(Models(description, other=small), a=16)
    await serving(leader)
    leader.choose("other", outgoing=("sums",))
    await leader.run_for(5)
    leader.obey("loading", a=0)
    await leader.run_for(30)
    assert leader.states()["sums"] == "outgoing"
    leader.obey(a=0)
    await leader.run_for(NEWS_S)
    assert leader.states()["sums"] == "stopped"
    leader.obey(a=2)
    await leader.run_for(10)
    assert leader.states()["sums"] == "stopped"
    leader.obey(a=0)
    await leader.run_for(5)
    assert leader.states() == {"other": "planned"}


async def test_without_room_for_both_the_old_one_goes_first(clock: MockClock) -> None:
    leader = Leader(Models(description, other=description), a=10)
    await serving(leader)
    leader.choose("other", outgoing=("sums",))
    await leader.run_for(5)
    assert leader.states() == {"sums": "stopped", "other": "waiting"}
    assert "waits for the memory of sums" in leader.model("other").reason
    leader.obey(a=1)
    await leader.run_for(STOP_GRACE_S - 10)
    assert leader.states() == {"sums": "stopped", "other": "waiting"}
    await leader.run_for(15)
    assert leader.states() == {"other": "planned"}


async def test_a_new_model_that_cannot_be_served_ends_nothing(clock: MockClock) -> None:
    huge = Models(description, other=lambda: description(layer_bytes=100 * GIB))
    leader = Leader(huge, a=16)
    await serving(leader)
    leader.choose("other", outgoing=("sums",))
    await leader.run_for(300)
    assert leader.states() == {"sums": "outgoing", "other": "waiting"}
    # It can be taken back: not even its head notices.
    leader.choose("sums")
    await leader.run_for(5)
    assert leader.states() == {"sums": "planned"}
    assert (nodes(leader.model().pipelines), leader.model().retiring) == ([["a"]], ())


async def test_a_stopped_model_ends(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16)
    await serving(leader)
    leader.choose()
    await leader.run_for(5)
    assert leader.states() == {"sums": "stopped"}
    leader.obey(a=0)
    await leader.run_for(5)
    assert leader.plan.models == ()
    leader.choose("sums")
    await leader.run_for(5)
    assert leader.states() == {"sums": "planned"}


async def test_models_share_nodes_by_what_is_left_over(clock: MockClock) -> None:
    leader = Leader(Models(description, other=small), a=12, b=12)
    await serving(leader)
    before = leader.model()
    leader.choose("sums", "other")
    await serving(leader)
    assert leader.states() == {"sums": "planned", "other": "planned"}
    assert set(leader.model().pipelines) == set(before.pipelines)
    assert sorted(nodes(leader.model("other").pipelines)) == [["a"], ["b"]]
    offer = leader.model("other").basis.inputs.offers[0]  # type: ignore[union-attr]
    assert offer.taken > 6 * GIB
    assert overcommitted(leader.plan, offer) == ""


async def test_no_model_has_two_pipelines_while_another_one_has_none(clock: MockClock) -> None:
    leader = Leader(Models(description, other=description), a=10, b=10)
    await serving(leader)
    assert nodes(leader.model().pipelines) == [["a"], ["b"]]
    [kept, given] = leader.model().pipelines
    leader.choose("sums", "other")
    await leader.run_for(5)
    assert leader.model().pipelines == (kept,)
    assert nodes(leader.model("other").pipelines) == [["b"]]
    # There was no room for the second one to retire, and it is not forgotten when there is.
    leader.choose("sums")
    leader.obey()
    await leader.run_for(5)
    leader.obey(b=0)
    await leader.run_for(5)
    assert [pipeline.id for pipeline in leader.model().pipelines] == [
        pipeline_id("sums", "f", pipeline.stages) for pipeline in (kept, given)
    ]


async def test_a_model_without_room_says_what_to_do(clock: MockClock) -> None:
    leader = Leader(Models(description, other=description), a=10)
    await serving(leader)
    leader.choose("sums", "other")
    await leader.run_for(5)
    assert leader.states() == {"sums": "planned", "other": "waiting"}
    reason = leader.model("other").reason
    assert "no room for it beside sums" in reason
    assert "`pxd models use --only other`" in reason
    assert "GiB" in reason


async def test_a_model_that_came_later_keeps_its_place(clock: MockClock) -> None:
    """The older one is served by nobody: what has to be done for it may not end the other."""
    leader = Leader(Models(description, other=small), a=4, b=4)
    leader.choose("sums", "other")
    await serving(leader)
    assert leader.states() == {"other": "planned", "sums": "waiting"}
    before = leader.model("other").pipelines
    leader.add("c", 8)
    leader.changed.notify()
    await serving(leader)
    assert leader.states() == {"other": "planned", "sums": "planned"}
    kept = leader.model("other").pipelines
    assert {pipeline.id for pipeline in kept} & {pipeline.id for pipeline in before}


async def test_a_model_takes_the_room_that_another_one_has_left(clock: MockClock) -> None:
    other = description(layers=6, layer_bytes=2 * GIB // 3)
    leader = Leader(Models(description, other=lambda: other), a=8, b=8)
    await serving(leader)
    leader.choose("sums", "other")
    await serving(leader)
    assert [sorted(line) for line in nodes(leader.model("other").pipelines)] == [["a", "b"]]
    leader.choose("other")
    await leader.run_for(5)
    leader.obey(a=0, b=0)
    await leader.run_for(5)
    assert leader.states() == {"other": "planned"}
    assert sorted(nodes(leader.model("other").pipelines)) == [["a"], ["b"]]
