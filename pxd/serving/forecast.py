"""What a model's pipelines are expected to do, beside what they were measured to do."""

import logging

import msgspec

from pxd.cluster.plans import ModelPlan, PipelinePlan
from pxd.cluster.records import StageReport
from pxd.planning.auto.estimate import estimate
from pxd.planning.auto.problem import Problem
from pxd.planning.planner import as_cut
from pxd.planning.replan import is_served
from pxd.planning.result import PlanInputs, Workload
from pxd.serving.basis import inputs_of
from pxd.serving.readiness import Members, stage_report
from pxd.serving.status import Figures, PipelineFigures

log = logging.getLogger("pxd.serving.forecast")


def forecast(model: ModelPlan, members: Members) -> list[PipelineFigures]:
    """One entry per pipeline, from the records as they are now.

    Where a time to the first token has been measured, that for a prompt as long is predicted.
    """
    if model.basis is None:
        return [PipelineFigures() for _ in model.pipelines]
    inputs = inputs_of(model.name, model.basis.inputs.model, members)
    return [_pipeline(pipeline, inputs, members) for pipeline in model.pipelines]


def _pipeline(pipeline: PipelinePlan, inputs: PlanInputs, members: Members) -> PipelineFigures:
    head = members.get(pipeline.head)
    report = stage_report(head.record, pipeline.id) if head is not None else None
    prompt = report.ttft_tokens if report and report.ttft_tokens else inputs.workload.prompt
    workload = Workload(prompt=prompt, output=inputs.workload.output)
    try:
        predicted = _predicted(pipeline, msgspec.structs.replace(inputs, workload=workload))
    except Exception:
        # The model's cost came with the plan, from another node: it may be anything.
        log.info("nothing can be predicted of pipeline %s", pipeline.id, exc_info=True)
        predicted = None
    return PipelineFigures(predicted=predicted, measured=_measured(report))


def _predicted(pipeline: PipelinePlan, inputs: PlanInputs) -> Figures | None:
    problem = Problem(inputs)
    chain = pipeline.chain
    if not is_served(problem, chain):
        return None
    cut = as_cut(problem, chain)
    expected = estimate(problem, cut.order, cut.ends)
    return Figures(
        prompt_tokens=problem.work.prompt,
        ttft_ms=round(expected.ttft_s * 1000, 3),
        token_ms=round(expected.token_s * 1000, 3),
        tokens_per_s=round(expected.tokens_per_s, 3),
        bottleneck=chain[expected.bottleneck][0],
    )


def _measured(report: StageReport | None) -> Figures | None:
    if report is None or not report.token_s:
        return None
    return Figures(
        prompt_tokens=report.ttft_tokens,
        ttft_ms=round(report.ttft_s * 1000, 3) or None,
        token_ms=round(report.token_s * 1000, 3),
        tokens_per_s=round(report.tokens_per_s, 3) or None,
    )
