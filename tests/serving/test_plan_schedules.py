"""Any order of joins, losses, drains and choices of models: what must hold of every plan."""

from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.cluster.plans import ModelPlan, Plan
from pxd.cluster.soundness import flaw
from pxd.executors.protocol import ModelDescription
from pxd.planning.model import NodeOffer
from pxd.serving.audit import mismatch, overcommitted
from pxd.serving.readiness import readiness

from .conftest import inline_clock
from .leader import GIB, Leader, Models, description

SIZES = {"sums": 6, "other": 3, "third": 1}
NAMES = ("a", "b", "c", "d")

Event = tuple[str, str]

events = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["join", "lose", "drain", "resume"]), st.sampled_from(NAMES)),
        st.tuples(st.sampled_from(["use", "only", "stop"]), st.sampled_from(sorted(SIZES))),
        st.tuples(st.sampled_from(["ready", "loading", "idle", "busy"]), st.just("")),
    ),
    min_size=4,
    max_size=14,
)


def of_size(gib: int) -> ModelDescription:
    return description(layers=4, layer_bytes=gib * GIB // 4)


class Schedule:
    """A leader to whom all this happens. The plan is looked at whenever there is a new one."""

    def __init__(self, gib: dict[str, int], *, roomy: bool) -> None:
        models = Models(
            partial(of_size, SIZES["sums"]),
            other=partial(of_size, SIZES["other"]),
            third=partial(of_size, SIZES["third"]),
        )
        self.leader = Leader(models, a=gib["a"], b=gib["b"])
        self.gib = gib
        self.roomy = roomy
        self.seen = 0
        self.served: set[str] = set()

    async def play(self, schedule: list[Event]) -> None:
        await self.step()
        for event in schedule:
            self.happen(*event)
            await self.step()
        await self.settle()

    async def step(self, seconds: float = 3.0) -> None:
        await self.leader.run_for(seconds)
        for plan in self.leader.plans[self.seen :]:
            self.check(plan)
        self.seen = len(self.leader.plans)

    def happen(self, event: str, who: str) -> None:
        leader, members = self.leader, self.leader.cluster.members
        names = leader.choice.names
        match event:
            case "join" if who not in members or members[who].state == "dead":
                leader.add(who, self.gib[who])
            case "lose" if who in members and who != "a":
                members[who].state = "dead"
            case "drain" | "resume" if who in members:
                leader.record(who, drained=event == "drain")
            case "use":
                leader.choose(*dict.fromkeys((*names, who)))
            case "only":
                leader.choose(who, outgoing=tuple(name for name in names if name != who))
            case "stop":
                leader.choose(*(name for name in names if name != who))
            case "ready" | "loading":
                leader.obey(event)
            case "idle" | "busy":
                leader.obey("ready", **dict.fromkeys(members, int(event == "busy")))
        leader.changed.notify()
        self.served = {model.name for model in leader.plan.models if self.serves(model)}

    def serves(self, model: ModelPlan) -> bool:
        members = self.leader.cluster.members
        return any(readiness(pipeline, members).ready for pipeline in model.all_pipelines)

    def check(self, plan: Plan) -> None:
        assert flaw(plan) == ""
        for name, member in self.leader.cluster.members.items():
            own = NodeOffer(name, member.record.memory)
            assert overcommitted(plan, own) == ""
            for model in plan.models:
                assert mismatch(model, own) == ""
        models = {model.name: model for model in plan.models}
        wanted = self.leader.choice.names
        assert set(wanted) <= models.keys()
        if self.roomy:
            for name in self.served & set(wanted):
                assert self.serves(models[name]), f"{name} was served and is no more"

    async def settle(self) -> None:
        """Nothing more happens: all of it is over soon, and then the plan stays."""
        for _ in range(8):
            self.leader.obey("ready", **dict.fromkeys(NAMES, 0))
            await self.step(90)
        count = len(self.leader.plans)
        self.leader.obey("ready", **dict.fromkeys(NAMES, 0))
        await self.step(90)
        assert len(self.leader.plans) == count
        for model in self.leader.plan.models:
            if model.state == "planned":
                assert model.retiring == ()
            assert model.state != "stopped"


def play(schedule: list[Event], gib: list[int], *, roomy: bool) -> None:
    async def main() -> None:
        await Schedule(dict(zip(NAMES, gib, strict=True)), roomy=roomy).play(schedule)

    with pytest.MonkeyPatch.context() as patch:
        trio.run(main, clock=inline_clock(patch))


@settings(max_examples=25, deadline=None)
@given(events, st.lists(st.integers(1, 14), min_size=4, max_size=4))
def test_no_node_is_ever_given_more_than_it_offers(schedule: list[Event], gib: list[int]) -> None:
    play(schedule, gib, roomy=False)


@settings(max_examples=25, deadline=None)
@given(events)
def test_with_room_for_all_nothing_that_is_served_ends_by_a_plan(schedule: list[Event]) -> None:
    play(schedule, [200] * 4, roomy=True)
