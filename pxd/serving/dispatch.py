"""Sends requests to pipelines: which one, and what is on its way there."""

import math
from collections.abc import Callable

import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.p2p.network import Network
from pxd.planning.routing.router import Router, Wish
from pxd.serving.attempts import SUBMIT_TIMEOUT_S, Attempt, Attempts
from pxd.serving.head import SUBMIT, Submission
from pxd.serving.readiness import Members
from pxd.serving.router import is_sound_elsewhere, pick_pipeline
from pxd.serving.signal import Signal

SILENCE_S = 1.0
"""After so long without a word, requests leave a node that is suspected to be gone."""

GRACE_S = 0.5
"""What a suspected node gets to contradict before that: most that are only slow do it at once."""


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
        self._silent: dict[str, float] = {}

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
        return self.attempts.open(name, model.name, pipeline, tokens, members), pipeline

    def close(self, attempt: Attempt, *, cancel: bool) -> None:
        self.attempts.close(attempt, cancel=cancel)
        self.router(attempt.model).ended(attempt.pipeline)

    async def submit(self, attempt: Attempt, submission: Submission) -> bool:
        """Says whether the head took it before the attempt was lost.

        Raises `NetworkError`, and with it `CallFailed` for what the head says.
        """
        with attempt.submitting:
            await self._network.call(attempt.head, SUBMIT, submission, timeout=SUBMIT_TIMEOUT_S)
        return not attempt.submitting.cancelled_caught

    async def leave_silent(self) -> None:
        """Have requests that wait for a node that may be gone go on elsewhere, until cancelled.

        It takes seconds to be sure of a death, and a mere suspicion is often wrong: so they are
        moved only where that costs nothing but to compute them again. A node that is cut off itself
        suspects all others, and then there is no such place.
        """
        while True:
            changed = self.changed.event
            with trio.move_on_after(self._leave_silent(trio.current_time())):
                await changed.wait()

    def _leave_silent(self, now: float) -> float:
        """Returns in how many seconds to look again, whatever happens."""
        members = self.members()
        suspects = (peer for peer, member in members.items() if member.state == "suspect")
        self._silent = {peer: self._silent.get(peer, now) for peer in suspects}
        if not self._silent:
            return math.inf
        again = SILENCE_S
        for attempt in self.attempts:
            silent = attempt.nodes & self._silent.keys()
            if not silent or attempt.stays or attempt.lost:
                continue
            first = min(silent, key=self._silent.__getitem__)
            due = max(self._silent[first] + GRACE_S, attempt.heard + SILENCE_S)
            if now < due:
                again = min(again, due - now)
            elif self._is_sound_elsewhere(attempt, now):
                attempt.fail(f"silence: {members[first].record.name} does not answer")
        return again

    def _is_sound_elsewhere(self, attempt: Attempt, now: float) -> bool:
        plan = self.plan()
        model = next((m for m in plan.models if m.name == attempt.model), None) if plan else None
        return model is not None and is_sound_elsewhere(
            self.router(model.name), model, self.members(), tokens=attempt.tokens, now=now
        )
