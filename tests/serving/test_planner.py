"""The leader's service: when it makes a plan, and when it leaves the plan in force alone."""

import msgspec
import trio
from trio.testing import MockClock

from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.plans import Epoch, PipelinePlan, Plan
from pxd.cluster.records import PeerLink, StageReport
from pxd.executors.protocol import ExecutorDied, ModelDescription
from pxd.models.errors import ModelError
from pxd.planning.model import NodeOffer
from pxd.serving.audit import Audit, mismatch
from pxd.serving.plansync import PUSH, PlanSync

from .harness import ServingCluster
from .leader import GIB, Leader, Models, description


def chains(plan: Plan) -> list[set[str]]:
    return [{stage.node for stage in pipeline.stages} for pipeline in plan.models[0].pipelines]


async def test_one_plan_and_no_other_while_nothing_changes(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    await leader.run_for(60)
    [plan] = leader.plans
    assert (plan.epoch.term, plan.epoch.leader, plan.epoch.version) == (3, "a", 1)
    assert chains(plan) == [{"a", "b"}]
    [spare] = plan.models[0].spares
    assert spare.node == "c"


async def test_a_spare_takes_the_place_of_a_lost_node(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    await leader.run_for(60)
    leader.cluster.members["b"].state = "dead"
    await leader.run_for(60)
    assert len(leader.plans) == 2
    assert chains(leader.plans[1]) == [{"a", "c"}]


async def test_nodes_that_hold_the_whole_model_serve_it_side_by_side(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await leader.run_for(60)
    [plan] = leader.plans
    assert chains(plan) == [{"a"}, {"b"}]
    assert mismatch(plan.models[0], NodeOffer("b", 16 * GIB)) == ""
    assert "other memory" in mismatch(plan.models[0], NodeOffer("b", 8 * GIB))


async def test_a_model_is_looked_at_again_as_soon_as_somebody_has_it(clock: MockClock) -> None:
    def describe() -> ModelDescription:
        if not models.lenders:
            raise ModelError("there is no model sums; no other node has it")
        return description()

    models = Models(describe)
    leader = Leader(models, a=16)
    await leader.run_for(10)
    assert leader.states() == {"sums": "failed"}
    models.lenders = ["b"]
    leader.changed.notify()
    await leader.run_for(3)
    assert leader.states() == {"sums": "planned"}


async def test_the_plan_pins_the_revision_of_the_hub(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16)
    leader.choose("acme/sums", "sums")
    await leader.run_for(10)
    revisions = {model.name: model.revision for model in leader.plan.models}
    assert revisions == {"acme/sums": "c0ffee", "sums": ""}


async def test_figures_measured_while_serving_change_no_plan(clock: MockClock) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    await leader.run_for(60)
    [pipeline] = leader.plans[0].models[0].pipelines
    for stage in pipeline.stages:
        member = leader.cluster.members[stage.node]
        slow = 0.5 if stage.node == "a" else 0.001
        report = StageReport(
            model="sums",
            pipeline=pipeline.id,
            start=stage.start,
            end=stage.end,
            state="ready",
            decode_s=slow,
        )
        links = tuple(PeerLink(peer, 0.5, 1e-4) for peer in "abc" if peer != stage.node)
        member.record = msgspec.structs.replace(member.record, stages=(report,), links=links)
    leader.changed.notify()
    await leader.run_for(60)
    assert len(leader.plans) == 1


async def test_a_plan_that_does_not_follow_from_its_basis_is_found_out(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await leader.run_for(60)
    model = leader.plans[0].models[0]
    worse = msgspec.structs.replace(model, pipelines=model.pipelines[:1])
    assert "this node's from the same basis" in mismatch(worse, NodeOffer("b", 16 * GIB))
    [one, other] = model.pipelines
    stage = msgspec.structs.replace(one.stages[0], end=3)
    cut = msgspec.structs.replace(model, pipelines=(PipelinePlan("p", (stage,)), other))
    assert "cannot be made" in mismatch(cut, NodeOffer("b", 16 * GIB))
    assert model.basis is not None
    absurd = msgspec.structs.replace(model.basis.inputs.model, kv_bytes_per_token=(4,) * 5)
    inputs = msgspec.structs.replace(model.basis.inputs, model=absurd)
    basis = msgspec.structs.replace(model.basis, inputs=inputs)
    twisted = msgspec.structs.replace(model, basis=basis)
    assert "cannot be made" in mismatch(twisted, NodeOffer("b", 16 * GIB))


async def test_the_audit_tells_what_it_found_and_takes_it_back(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    await leader.run_for(60)
    [plan] = leader.plans
    bad = msgspec.structs.replace(plan.models[0], pipelines=plan.models[0].pipelines[:1])
    send, told = trio.open_memory_channel[str](4)
    audit = Audit("b", lambda: NodeOffer("b", 16 * GIB), send.send_nowait)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(audit.run)
        audit.check(msgspec.structs.replace(plan, models=(bad,)))
        assert (await told.receive()).startswith(f"plan {plan.epoch}: ")
        audit.check(plan)
        assert await told.receive() == ""
        nursery.cancel_scope.cancel()


async def test_a_shortage_is_a_plan_that_says_what_is_missing(clock: MockClock) -> None:
    leader = Leader(Models(description), a=1, b=1)
    await leader.run_for(5)
    [model] = leader.plans[0].models
    assert model.state == "waiting"
    assert "GiB" in model.reason


async def test_a_new_leader_plans_what_is_served_without_a_look_at_the_model(
    clock: MockClock,
) -> None:
    def nowhere() -> ModelDescription:
        raise ModelError("no such directory here")

    before = Leader(Models(description), a=8, b=8, c=8)
    before.choose("acme/sums")
    await before.run_for(60)
    leader = Leader(Models(nowhere), a=8, b=8, c=8)
    leader.choose("acme/sums")
    leader.sync.offer(msgspec.structs.replace(before.plan, epoch=Epoch(2, "b", 1)))
    leader.obey()
    await leader.run_for(120)
    assert len(leader.plans) == 1
    leader.cluster.members["b"].state = "dead"
    leader.changed.notify()
    await leader.run_for(120)
    assert chains(leader.plan) == [{"a", "c"}]
    assert mismatch(leader.plan.models[0], NodeOffer("c", 8 * GIB)) == ""
    old, new = before.plan.models[0], leader.plan.models[0]
    for part in ("fingerprint", "revision", "layers", "context"):
        assert getattr(new, part) == getattr(old, part), part


async def test_what_is_served_is_the_model_and_not_what_the_leader_has_by_that_name(
    clock: MockClock,
) -> None:
    before = Leader(Models(description), a=8, b=8)
    await before.run_for(60)
    other = msgspec.structs.replace(description(), fingerprint="another")
    leader = Leader(Models(lambda: other), a=8, b=8)
    leader.sync.offer(msgspec.structs.replace(before.plan, epoch=Epoch(2, "b", 1)))
    leader.obey()
    await leader.run_for(120)
    assert len(leader.plans) == 1


async def test_a_leader_looks_at_a_model_that_nobody_serves(clock: MockClock) -> None:
    def nowhere() -> ModelDescription:
        raise ModelError("no such directory here")

    before = Leader(Models(description), a=1)
    await before.run_for(60)
    assert before.states() == {"sums": "waiting"}
    leader = Leader(Models(nowhere), a=1)
    leader.sync.offer(msgspec.structs.replace(before.plan, epoch=Epoch(2, "b", 1)))
    await leader.run_for(60)
    assert leader.states() == {"sums": "failed"}
    assert "no such directory" in leader.model().reason


async def test_a_failure_is_published_once_and_tried_again_in_its_time(clock: MockClock) -> None:
    models = Models(description)

    def die() -> ModelDescription:
        raise ExecutorDied(f"killed, process {models.calls}")

    models.answer = die
    leader = Leader(models, a=16)
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leader.planner.run, leader.changed)
            while True:
                await trio.sleep(1)
                leader.changed.notify()
    assert len(leader.plans) == 1
    assert 2 <= models.calls <= 5
    models.answer = description
    await leader.run_for(60)
    assert leader.plans[-1].models[0].pipelines


async def test_only_its_author_pushes_a_plan(clock: MockClock) -> None:
    cluster = ServingCluster("a", "b", "c")
    plans: list[Plan] = []
    PlanSync(cluster.nodes["b"].network, lambda: cluster.members, plans.append, lambda: 0)
    async with cluster.running():
        plan = cluster.make_plan("a", "b")
        await cluster.nodes["c"].network.call("b", PUSH, plan, timeout=5)
        assert plans == []
        # One of a term far beyond all others could never be replaced.
        absurd = msgspec.structs.replace(plan, epoch=Epoch(LAST_COUNT, "a", 1))
        await cluster.nodes["a"].network.call("b", PUSH, absurd, timeout=5)
        assert plans == []
        await cluster.nodes["a"].network.call("b", PUSH, plan, timeout=5)
        assert plans == [plan]
