"""Plans, their epochs, and which plan a node holds."""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from pxd.planning.model import Chain
from pxd.planning.result import Basis
from pxd.wire import Count, Identifier, Name, Reason

SPARE_PREFIX = "spare-"
"""Begins the pipeline id of a stage that no pipeline needs, but that is held ready."""


class Epoch(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Total order of plans: a greater term wins, then the leader's id, then its version."""

    term: Count
    leader: Annotated[str, msgspec.Meta(max_length=128)]
    version: Count

    def __str__(self) -> str:
        return f"{self.term}.{self.version}@{self.leader[-6:]}"


class StagePlan(msgspec.Struct, frozen=True):
    """Decoder layers [start, end) on one node, and the bytes it may spend on their KV caches."""

    node: Identifier
    start: Count
    end: Count
    kv_bytes: Count = 0


class PipelinePlan(msgspec.Struct, frozen=True):
    """Stages that cover [0, L) exactly, in order; see `pipeline_id` for `id`."""

    id: Identifier
    stages: Annotated[tuple[StagePlan, ...], msgspec.Meta(min_length=1, max_length=1024)]

    @property
    def head(self) -> str:
        return self.stages[0].node

    @property
    def tail(self) -> str:
        return self.stages[-1].node

    @property
    def chain(self) -> Chain:
        """The stages in the planner's terms."""
        return chain_of(self.stages)


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one model. `reason` says why it waits; with pipelines it is empty.

    `spares` hold a range ready that no pipeline needs of them, for when a node is lost. `retiring`
    are pipelines of plans before that go on until those that replace them are ready; nodes may be
    in both. `revision` is the hub's commit of the files, empty if they do not come from there.
    `outgoing` is a model that goes once others serve in its place, and one that is
    `stopped` takes no new requests; both have nothing but retiring pipelines. `basis` is what the
    plan follows from, so that every node can make sure that it does.
    """

    name: Name
    fingerprint: Annotated[str, msgspec.Meta(max_length=128)] = ""
    revision: Annotated[str, msgspec.Meta(max_length=128)] = ""
    layers: Count = 0
    context: Count = 0
    pipelines: Annotated[tuple[PipelinePlan, ...], msgspec.Meta(max_length=1024)] = ()
    spares: Annotated[tuple[StagePlan, ...], msgspec.Meta(max_length=1024)] = ()
    state: Literal["planned", "waiting", "failed", "outgoing", "stopped"] = "planned"
    reason: Reason = ""
    basis: Basis | None = None
    retiring: Annotated[tuple[PipelinePlan, ...], msgspec.Meta(max_length=1024)] = ()

    @property
    def all_pipelines(self) -> tuple[PipelinePlan, ...]:
        """Those that requests may ride, the retiring ones last."""
        return self.pipelines + self.retiring


class Plan(msgspec.Struct, frozen=True):
    epoch: Epoch
    models: Annotated[tuple[ModelPlan, ...], msgspec.Meta(max_length=64)]

    def pipeline(self, pipeline_id: str) -> tuple[ModelPlan, PipelinePlan] | None:
        for model in self.models:
            for pipeline in model.all_pipelines:
                if pipeline.id == pipeline_id:
                    return model, pipeline
        return None


def chain_of(stages: tuple[StagePlan, ...]) -> Chain:
    return tuple((stage.node, stage.start, stage.end) for stage in stages)


def pipeline_id(model: str, fingerprint: str, stages: tuple[StagePlan, ...]) -> str:
    """Digest of everything that makes two pipelines interchangeable.

    A chain that a new plan keeps has the same id in both epochs, so its requests go on undisturbed.
    """
    content = msgspec.msgpack.encode((model, fingerprint, chain_of(stages)))
    return hashlib.sha256(content).hexdigest()[:16]


def spare_stages(model: ModelPlan) -> Iterator[PipelinePlan]:
    """The model's spares, each as a pipeline of its own that no request ever rides."""
    for spare in model.spares:
        digest = pipeline_id(model.name, model.fingerprint, (spare,))
        yield PipelinePlan(SPARE_PREFIX + digest, (spare,))


class PlanStore:
    """Holds the plan with the greatest epoch seen."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.plan = plan

    @property
    def epoch(self) -> Epoch | None:
        return self.plan.epoch if self.plan else None

    def offer(self, plan: Plan) -> bool:
        """Take `plan` if its epoch is greater than the one held; say whether it was taken."""
        if self.plan is not None and plan.epoch <= self.plan.epoch:
            return False
        self.plan = plan
        return True
