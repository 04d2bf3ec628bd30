"""Whether a plan makes sense at all, whoever wrote it: every node looks before it takes one."""

from itertools import pairwise

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan, pipeline_id


def flaw(plan: Plan) -> str:
    """What is wrong with `plan`, in words; empty if nothing is.

    Each model appears once; its pipelines cover all layers in order and, unless they retire, share
    no node.
    """
    names = [model.name for model in plan.models]
    if len(set(names)) < len(names):
        return "it plans a model twice"
    return next((f"{m.name}: {found}" for m in plan.models if (found := _model_flaw(m))), "")


def _model_flaw(model: ModelPlan) -> str:
    if (model.state == "planned") != bool(model.pipelines):
        return f"its state is {model.state} with {len(model.pipelines)} pipelines"
    nodes = [stage.node for pipeline in model.pipelines for stage in pipeline.stages]
    nodes += [spare.node for spare in model.spares]
    if len(set(nodes)) < len(nodes):
        return "a node has two stages"
    if model.state in ("outgoing", "stopped") and model.spares:
        return f"it is {model.state} and has spares"
    ids = [pipeline.id for pipeline in model.all_pipelines]
    if len(set(ids)) < len(ids):
        return "a pipeline is in it twice"
    for pipeline in model.all_pipelines:
        if found := _pipeline_flaw(model, pipeline):
            return found
    for spare in model.spares:
        if not spare.start < spare.end <= model.layers:
            return f"a spare holds layers [{spare.start}, {spare.end}) of {model.layers}"
    basis = model.basis
    if basis is not None and model.all_pipelines:
        cost = basis.inputs.model
        if cost.layers != model.layers:
            return f"it has {model.layers} layers and costs {cost.layers}"
        if not cost.is_consistent:
            return "not every layer has its cost"
    return ""


def _pipeline_flaw(model: ModelPlan, pipeline: PipelinePlan) -> str:
    stages = pipeline.stages
    if len({stage.node for stage in stages}) < len(stages):
        return "a pipeline goes through a node twice"
    if pipeline.id != pipeline_id(model.name, model.fingerprint, stages):
        return f"{pipeline.id} is not the id of that pipeline"
    whole = stages[0].start == 0 and stages[-1].end == model.layers
    joined = all(one.end == other.start for one, other in pairwise(stages))
    if not whole or not joined or any(stage.start >= stage.end for stage in stages):
        ranges = ", ".join(f"[{stage.start}, {stage.end})" for stage in stages[:8])
        return f"a pipeline of {ranges} does not cover {model.layers} layers"
    return ""
