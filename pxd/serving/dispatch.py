"""Sends requests to pipelines: which one, and what is on its way there."""

from collections.abc import Callable

import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.p2p.network import Network
from pxd.planning.routing.router import Router, Wish
from pxd.serving.attempts import SUBMIT_TIMEOUT_S, Attempt, Attempts
from pxd.serving.head import SUBMIT, Submission
from pxd.serving.readiness import Members
from pxd.serving.router import pick_pipeline
from pxd.serving.signal import Signal


class Dispatch:
    """`plan` and `members` give the present view of the cluster, `changed` its changes."""

    def __init__(
        self,
        network: Network,
        plan: Callable[[], Plan | None],
        members: Callable[[], Members],
        changed: Signal,
    ) -> None:
        self.plan = plan
        self.members = members
        self.changed = changed
        self.attempts = Attempts(network)
        self._network = network
        self._routers: dict[str, Router] = {}
        self._suspects: dict[str, trio.Semaphore] = {}

    def apply(self, plan: Plan) -> None:
        """Forget what is known of models that the plan no longer has."""
        names = {model.name for model in plan.models}
        self._routers = {name: kept for name, kept in self._routers.items() if name in names}
        self._suspects = {name: kept for name, kept in self._suspects.items() if name in names}

    def router(self, model: str) -> Router:
        return self._routers.setdefault(model, Router())

    def suspects(self, model: str) -> trio.Semaphore:
        """For placing requests of a model that an executor died over: one at a time, as a head
        takes no more than one."""
        return self._suspects.setdefault(model, trio.Semaphore(1))

    def open(
        self, name: str, model: ModelPlan, wish: Wish, tokens: int
    ) -> tuple[Attempt, PipelinePlan]:
        """An attempt of a request that may take `tokens` positions, and its pipeline. It has to be
        closed. Raises `NotReady`."""
        members, now = self.members(), trio.current_time()
        router = self.router(model.name)
        pipeline = pick_pipeline(router, model, members, wish, tokens=tokens, now=now)
        return self.attempts.open(name, pipeline, members), pipeline

    def close(self, model: str, attempt: Attempt, *, cancel: bool) -> None:
        self.attempts.close(attempt, cancel=cancel)
        self.router(model).ended(attempt.pipeline)

    async def submit(self, head: str, submission: Submission) -> None:
        """Raises `NetworkError`, and with it `CallFailed` for what the head says."""
        await self._network.call(head, SUBMIT, submission, timeout=SUBMIT_TIMEOUT_S)
