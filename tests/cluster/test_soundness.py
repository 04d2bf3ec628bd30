import msgspec
import pytest

from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan, pipeline_id
from pxd.cluster.soundness import flaw
from pxd.planning.result import Basis
from tests.planning.clusters import inputs_of, model_of


def line(*stages: tuple[str, int, int], model: str = "m") -> PipelinePlan:
    made = tuple(StagePlan(*stage) for stage in stages)
    return PipelinePlan(pipeline_id(model, "f", made), made)


GOOD = ModelPlan(
    name="m",
    fingerprint="f",
    layers=8,
    pipelines=(line(("a", 0, 3), ("b", 3, 8)), line(("c", 0, 8))),
    spares=(StagePlan("d", 2, 5),),
)


def plan(*models: ModelPlan) -> Plan:
    return Plan(Epoch(1, "a", 1), models)


def test_sound_plans() -> None:
    assert flaw(plan(GOOD)) == ""
    assert flaw(plan()) == ""
    assert flaw(plan(ModelPlan(name="m", state="waiting", reason="too small"))) == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pipelines": (line(("a", 0, 3), ("b", 4, 8)),)}, "does not cover"),
        ({"pipelines": (line(("a", 0, 3)),)}, "does not cover"),
        ({"pipelines": (line(("a", 1, 8)),)}, "does not cover"),
        ({"pipelines": (line(("a", 0, 0), ("b", 0, 8)),)}, "does not cover"),
        ({"pipelines": (line(("a", 0, 5), ("b", 5, 3), ("c", 3, 8)),)}, "does not cover"),
        ({"pipelines": (line(("a", 0, 3), ("a", 3, 8)),)}, "two stages"),
        ({"pipelines": (line(("a", 0, 8)), line(("a", 0, 8)))}, "two stages"),
        ({"spares": (StagePlan("a", 0, 2),)}, "two stages"),
        ({"spares": (StagePlan("d", 2, 9),)}, "spare"),
        ({"spares": (StagePlan("d", 2, 2),)}, "spare"),
        ({"pipelines": (line(("a", 0, 8), model="other"),)}, "not the id"),
        ({"pipelines": ()}, "planned with 0"),
        ({"state": "waiting"}, "waiting with 2"),
    ],
)
def test_flaws_are_named(changes: dict[str, object], words: str) -> None:
    assert words in flaw(plan(msgspec.structs.replace(GOOD, **changes)))


def test_every_layer_has_its_cost() -> None:
    def costing(**changes: object) -> ModelPlan:
        cost = model_of(8, **changes)
        return msgspec.structs.replace(GOOD, basis=Basis(inputs=inputs_of(cost, ())))

    assert flaw(plan(costing())) == ""
    assert "its cost" in flaw(plan(costing(layer_flops=(1,) * 7)))
    assert "its cost" in flaw(plan(costing(kv_bytes_per_token=())))
    short = msgspec.structs.replace(costing(), layers=9, pipelines=(line(("a", 0, 9)),))
    assert "costs 8" in flaw(plan(short))


def test_a_model_appears_once() -> None:
    assert "twice" in flaw(plan(GOOD, GOOD))
