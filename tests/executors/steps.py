"""One step on a worker process, for tests that wait for its result at once."""

import trio

from pxd.executors.process import WorkerExecutor
from pxd.executors.protocol import StepResult
from pxd.wire import Buffer, Nack, Sampled, Step


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
