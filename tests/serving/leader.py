"""A leader's planner in virtual time, with members that are described by hand."""

from collections.abc import Callable

import msgspec
import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan, spare_stages
from pxd.cluster.records import Device, ModelChoice, NodeRecord, StageReport
from pxd.executors.protocol import ModelDescription
from pxd.planning.model import ModelCost
from pxd.serving.models import merged_cost
from pxd.serving.planner import Office, Planner
from pxd.serving.plansync import PlanSync
from pxd.serving.signal import Signal
from tests.memory_network import MemoryHub

from .harness import Member, ServingCluster

GIB = 1 << 30


def description(layers: int = 6, layer_bytes: int = GIB) -> ModelDescription:
    return ModelDescription(
        architecture="sums",
        layers=layers,
        hidden_size=1,
        vocabulary=97,
        context=512,
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=1000,
        head_bytes=1000,
        tied=False,
        kv_bytes_per_token=(4,) * layers,
        splits=tuple(range(1, layers)),
        eos=(96,),
        fingerprint="f",
    )


class Models:
    """All models are of one kind, but for those in `others`."""

    def __init__(
        self, answer: Callable[[], ModelDescription], **others: Callable[[], ModelDescription]
    ) -> None:
        self.answer = answer
        self.others = others
        self.calls = 0
        self.lenders: list[str] = []
        self.takes_s: dict[str, float] = {}

    async def describe(self, name: str) -> ModelDescription:
        self.calls += 1
        await trio.sleep(self.takes_s.get(name, 0))
        return self.others.get(name, self.answer)()

    def holders(self, name: str) -> list[str]:
        return self.lenders

    def revision(self, name: str) -> str:
        return "" if "/" not in name else "c0ffee"

    async def cost(self, name: str) -> ModelCost:
        return merged_cost(self.others.get(name, self.answer)(), None)


class Leader:
    """Node a of a cluster whose members are described by hand."""

    def __init__(self, models: Models, **memory_gib: float) -> None:
        self.cluster = ServingCluster(*memory_gib)
        for name, gib in memory_gib.items():
            self.add(name, gib)
        self.changed = Signal()
        self.choice = ModelChoice(1, "a", ("sums",))
        self.plans: list[Plan] = []
        self.sync = PlanSync(
            MemoryHub().network("a"),
            lambda: {"a": self.cluster.members["a"]},
            self.taken,
            lambda: 3,
        )
        self.planner = Planner(
            "a",
            models,  # type: ignore[arg-type]
            self.sync,
            lambda: Office(True, 3),
            lambda: self.cluster.members,
            lambda: self.choice,
        )

    def add(self, name: str, gib: float) -> None:
        record = NodeRecord(
            id=name, name=name, started=1.0, memory=int(gib * GIB), device=Device(tflops=1.0)
        )
        self.cluster.members[name] = Member(record)

    def taken(self, plan: Plan) -> None:
        self.plans.append(plan)
        self.changed.notify()

    async def run_for(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self.planner.run(self.changed)

    def record(self, name: str, **changes: object) -> None:
        member = self.cluster.members[name]
        member.record = msgspec.structs.replace(member.record, **changes)
        self.changed.notify()

    def choose(self, *names: str, outgoing: tuple[str, ...] = ()) -> None:
        self.choice = ModelChoice(self.choice.stamp + 1, "a", names, outgoing)
        self.changed.notify()

    @property
    def plan(self) -> Plan:
        return self.plans[-1]

    def model(self, name: str = "sums") -> ModelPlan:
        return next(model for model in self.plan.models if model.name == name)

    def states(self) -> dict[str, str]:
        return {model.name: model.state for model in self.plan.models}

    def obey(self, state: str = "ready", **requests: int) -> None:
        """Nodes hold what the plan says; what is new to them is in `state`. `requests` are those
        that the heads of retiring pipelines have left, by node."""
        stages: dict[str, list[StageReport]] = {name: [] for name in self.cluster.members}
        for model in self.plan.models:
            for pipeline in (*model.all_pipelines, *spare_stages(model)):
                for stage in pipeline.stages:
                    held = self._held(stage.node, pipeline)
                    report = held or StageReport(
                        model=model.name,
                        pipeline=pipeline.id,
                        start=stage.start,
                        end=stage.end,
                        state=state,  # type: ignore[arg-type]
                        kv_tokens=1024,
                    )
                    told = requests.get(stage.node) if pipeline in model.retiring else None
                    stages[stage.node].append(msgspec.structs.replace(report, requests=told))
        for name, reports in stages.items():
            self.record(name, stages=tuple(reports))

    def _held(self, node: str, pipeline: PipelinePlan) -> StageReport | None:
        reports = self.cluster.members[node].record.stages
        return next(
            (each for each in reports if each.pipeline == pipeline.id and each.state == "ready"),
            None,
        )


def nodes(pipelines: tuple[PipelinePlan, ...]) -> list[list[str]]:
    return [[stage.node for stage in pipeline.stages] for pipeline in pipelines]
