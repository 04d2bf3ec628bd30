"""Plans in the simulator: `pxd.serving.planner` and `pxd.serving.plansync` as they decide, without
trio and without models. The plan is a toy, everything about its epoch is real."""

from collections.abc import Iterable
from typing import Protocol

import msgspec

from pxd.cluster.adoption import Members, later_source, may_push
from pxd.cluster.members import Member, MemberEvent
from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, PlanStore, StagePlan
from pxd.cluster.plans import pipeline_id as id_of
from pxd.cluster.soundness import flaw
from pxd.serving.plansync import PULL_RETRY_S, PUSH_TIMEOUT_S
from pxd.serving.settling import QUIET_S

STAGES = 8
"""Nodes that a toy plan has use for, so that it is of one size in clusters of any size."""


class PlanMessage(msgspec.Struct, frozen=True):
    """What processes say to each other about plans."""


class Push(PlanMessage, frozen=True, tag=True):
    plan: Plan


class Pushed(PlanMessage, frozen=True, tag=True):
    held: Epoch | None


class Pull(PlanMessage, frozen=True, tag=True):
    call: int


class Pulled(PlanMessage, frozen=True, tag=True):
    call: int
    plan: Plan | None


class Host(Protocol):
    """The process that it all happens in."""

    name: str

    @property
    def leads(self) -> int: ...
    @property
    def members(self) -> Members: ...
    def send(self, peer: str, message: PlanMessage) -> None: ...
    def after(self, seconds: float, step: "Step", *args: object) -> None: ...
    def adopted(self, plan: Plan) -> None: ...


class Step(Protocol):
    def __call__(self, *args: object) -> None: ...


class SimulatedPlans:
    """One process's plan, and its part in making and spreading them."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._store = PlanStore()
        self._ahead: set[str] = set()
        self._unreachable = ""
        self._refused: Epoch | None = None
        self._behind = self._pulling = self._planning = False
        self._call = 0

    @property
    def plan(self) -> Plan | None:
        return self._store.plan

    @property
    def epoch(self) -> Epoch | None:
        return self._store.epoch

    # As Planner does

    def inputs_changed(self) -> None:
        """Something that a plan follows from is different: plan once the burst is over."""
        if not self._planning:
            self._planning = True
            self._host.after(QUIET_S, self._replan)

    def _replan(self) -> None:
        self._planning = False
        host, current = self._host, self.plan
        if not host.leads:
            return
        model = toy_model(current, host.members)
        if model is None or (current is not None and current.models == (model,)):
            return
        again = current is not None and current.epoch.term == host.leads
        version = current.epoch.version + 1 if current is not None and again else 1
        self._publish(Plan(Epoch(host.leads, host.name, version), (model,)))

    # As PlanSync does

    def _publish(self, plan: Plan) -> None:
        if not self._offer(plan):
            return
        for peer, member in self._host.members.items():
            if member.state == "alive" and peer != self._host.name:
                self._host.send(peer, Push(plan))

    def receive(self, peer: str, message: PlanMessage) -> None:
        host = self._host
        match message:
            case Push(plan):
                if may_push(peer, plan, host.members):
                    self._consider(plan)
                host.send(peer, Pushed(self._store.epoch))
            case Pushed(held):
                if held is not None and self.epoch is not None and held > self.epoch:
                    self._look()
            case Pull(call):
                host.send(peer, Pulled(call, self.plan))
            case Pulled(call, plan):
                if self._pulling and call == self._call:
                    self._pulling = False
                    if plan is not None:
                        self._consider(plan)
                    self._next_pull()

    def follow(self, events: Iterable[MemberEvent]) -> None:
        """Does anybody hold a later plan? Looks only when somebody might, which is the same."""
        for event in events:
            plan = event.record.plan
            if plan is not None and (self.epoch is None or plan > self.epoch):
                self._ahead.add(event.record.id)
        if self._ahead and self._source() is not None:
            self._look()

    def _source(self) -> str | None:
        members = self._host.members
        ahead = {peer: members[peer] for peer in sorted(self._ahead) if peer in members}
        return later_source(self.epoch, ahead, self._unreachable, self._refused)

    def _consider(self, plan: Plan) -> None:
        if flaw(plan):
            self._refused = plan.epoch
        else:
            self._offer(plan)

    def _offer(self, plan: Plan) -> bool:
        if not self._store.offer(plan):
            return False
        members = self._host.members
        self._ahead = {
            peer
            for peer in self._ahead
            if peer in members
            and (held := members[peer].record.plan) is not None
            and held > plan.epoch
        }
        self._host.adopted(plan)
        return True

    def _look(self) -> None:
        self._behind = True
        self._next_pull()

    def _next_pull(self) -> None:
        if self._pulling or not self._behind:
            return
        self._behind = False
        source = self._source()
        if source is None:
            return
        self._pulling = True
        self._call += 1
        self._host.send(source, Pull(self._call))
        self._host.after(PUSH_TIMEOUT_S, self._no_answer, self._call, source)

    def _no_answer(self, call: int, source: str) -> None:
        if self._pulling and call == self._call:
            self._unreachable = source
            self._host.after(PULL_RETRY_S, self._retry, call)

    def _retry(self, call: int) -> None:
        if self._pulling and call == self._call:
            self._pulling = False
            self._look()


def toy_model(current: Plan | None, members: Members) -> ModelPlan | None:
    """One layer on each of the first few that are there, and as few changes as may be."""
    there = {id_ for id_, member in members.items() if _takes_part(member)}
    kept = [stage.node for stage in _stages(current) if stage.node in there]
    if len(kept) < STAGES:
        free = sorted((members[id_].record.seniority, id_) for id_ in there.difference(kept))
        kept += [id_ for _, id_ in free[: STAGES - len(kept)]]
    if not kept:
        return None
    stages = tuple(StagePlan(node, layer, layer + 1) for layer, node in enumerate(kept))
    pipeline = PipelinePlan(id_of("toy", "", stages), stages)
    return ModelPlan(name="toy", layers=len(stages), pipelines=(pipeline,))


def _takes_part(member: "Member") -> bool:
    return member.live and not member.record.leaving and member.record.seniority > 0


def _stages(plan: Plan | None) -> tuple[StagePlan, ...]:
    return plan.models[0].pipelines[0].stages if plan is not None else ()
