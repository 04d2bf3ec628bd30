"""A lone pipeline: the leader looks for a second one again, for figures of a moment may mislead."""

import msgspec
import pytest
from trio.testing import MockClock

from pxd.cluster.plans import ModelPlan, Plan
from pxd.cluster.records import Device
from pxd.planning.model import NodeOffer
from pxd.serving import planner
from pxd.serving.audit import mismatch
from pxd.serving.basis import basis_of
from pxd.serving.planner import LATEST_SECOND_S, SECOND_S

from .leader import GIB, Leader, Models, description, nodes

USUAL, BUSY = Device(tflops=1.0, bandwidth=50.0), Device(tflops=0.1, bandwidth=1.0)


async def alone(*, a: float = 16, b: float = 8, c: float = 8) -> Leader:
    """Unless told otherwise a holds the whole model, and so would b and c if c were not so slow."""
    leader = Leader(Models(description), a=a, b=b, c=c)
    for name, device in {"a": USUAL, "b": USUAL, "c": BUSY}.items():
        leader.record(name, device=device)
    await leader.run_for(5)
    leader.obey()
    assert len(nodes(leader.model().pipelines)) == 1
    return leader


async def test_it_is_found_once_the_figures_are_better(clock: MockClock) -> None:
    leader = await alone()
    count = len(leader.plans)
    leader.record("c", device=USUAL)
    await leader.run_for(SECOND_S - 10)
    assert len(leader.plans) == count
    await leader.run_for(20)
    assert sorted(map(sorted, nodes(leader.model().pipelines))) == [["a"], ["b", "c"]]
    assert mismatch(leader.model(), NodeOffer("a", 16 * GIB)) == ""
    leader.obey()
    leader.record("c", device=BUSY)
    await leader.run_for(3600)
    assert len(nodes(leader.model().pipelines)) == 2


async def test_what_is_being_loaded_comes_first(clock: MockClock) -> None:
    leader = await alone()
    leader.obey("loading")
    stages = {name: member.record.stages for name, member in leader.cluster.members.items()}
    for name, reports in stages.items():
        loading = tuple(msgspec.structs.replace(each, state="loading") for each in reports)
        leader.record(name, stages=loading, device=USUAL)
    count = len(leader.plans)
    await leader.run_for(10 * SECOND_S)
    assert len(leader.plans) == count
    for name, reports in stages.items():
        leader.record(name, stages=reports)
    await leader.run_for(10)
    assert len(nodes(leader.model().pipelines)) == 2


@pytest.mark.parametrize(("gib", "possible"), [((16, 8, 8), True), ((5, 5, 5), False)])
async def test_looks_become_rarer_and_there_are_none_in_vain(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch, gib: tuple[float, ...], possible: bool
) -> None:
    looks = 0

    def watched(inputs: object, current: object, *, rebalance: bool, second: bool) -> object:
        nonlocal looks
        looks += second
        return basis_of(inputs, current, rebalance=rebalance, second=second)  # type: ignore[arg-type]

    leader = await alone(**dict(zip("abc", gib, strict=True)))
    plan: Plan = leader.plan
    monkeypatch.setattr(planner, "basis_of", watched)
    await leader.run_for(2 * LATEST_SECOND_S)
    assert leader.plan is plan
    assert 5 <= looks <= 8 if possible else looks == 0
    model: ModelPlan = plan.models[0]
    assert len(model.pipelines) == 1
