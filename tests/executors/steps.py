"""Steps as tests run them: on a worker process whose result is waited for, and from a scheduler."""

import numpy as np
import trio

from pxd.engine.scheduler import PlannedStep
from pxd.executors.process import WorkerExecutor
from pxd.executors.protocol import StepOutput, StepResult
from pxd.executors.rows import draws_of
from pxd.wire import Buffer, Nack, Sampled, SampledToken, Step, Tensor


async def run_step(
    executor: WorkerExecutor, step: Step, body: Buffer
) -> Sampled | Nack | tuple[Step, Buffer]:
    """Raises `ExecutorError` or `ExecutorDied`, as the executor says."""
    results: list[StepResult] = []
    done = trio.Event()

    def take(result: StepResult) -> None:
        results.append(result)
        done.set()

    executor.submit(step, body, take)
    await done.wait()
    [result] = results
    if isinstance(result, Exception):
        raise result
    return result


def wire_step(planned: PlannedStep, session: int) -> tuple[Step, bytes]:
    """A scheduler's step as the first stage of pipeline "p" gets it."""
    tokens = np.array(planned.tokens, "<i4")
    step = Step(
        pipeline="p",
        session=session,
        step=planned.number,
        rows=planned.rows,
        tensor=Tensor("i32", tokens.shape),
        openings=planned.openings,
        grants=planned.grants,
        releases=planned.releases,
        store=planned.store,
        load=planned.load,
    )
    return step, tokens.tobytes()


def sampled_tokens(planned: PlannedStep, drawn: StepOutput) -> list[SampledToken]:
    """What the last stage drew in a step, as the scheduler takes it."""
    return [
        SampledToken(request, position, token)  # type: ignore[arg-type]
        for (request, position), token in zip(draws_of(planned.rows), drawn, strict=True)
    ]
