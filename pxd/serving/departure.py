"""A node that leaves: others take over what it serves, and its own clients' requests end, first.

It says in its record that it is leaving. The leader, another one by then, makes a plan without it,
in which its pipelines retire like those of a drained node: see `pxd.serving.handover`.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.notify import notify
from pxd.serving.clients import Clients
from pxd.serving.handover import is_replaced
from pxd.serving.readiness import Members, is_loaded
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving.departure")

CLIENTS_GRACE_S = 2.0
"""For what its own clients have asked, where nobody stays to serve them."""


class Records(Protocol):
    def update(self, **changes: Any) -> None: ...


class Departure:
    """Happens once. `limit` is the longest that others are waited for, in seconds.

    `waits_for` says what is waited for, empty while that is nothing.
    """

    def __init__(
        self,
        me: str,
        limit: float,
        records: Records,
        plan: Callable[[], Plan | None],
        members: Callable[[], Members],
        clients: Clients,
    ) -> None:
        self.waits_for = ""
        self._limit = limit
        self._me = me
        self._records = records
        self._plan = plan
        self._members = members
        self._clients = clients
        self._patience = trio.CancelScope()

    def hurry(self) -> None:
        """Wait for nothing any more."""
        self._patience.cancel()

    async def prepare(self, changed: Signal) -> None:
        """Return when nothing keeps this node any more, or it has waited for long enough.

        Its clients are told then, as far as they are still there.
        """
        self._records.update(leaving=True)
        began = trio.current_time()
        self._patience.deadline = began + self._limit
        with self._patience:
            while True:
                event = changed.event
                words = handing_over(self._me, self._plan(), self._members())
                if not words:
                    self._clients.refuse()
                    words = _requests(self._clients.count)
                self._say(words)
                if not words:
                    break
                if not _stays(self._me, self._members()):
                    grace = began + CLIENTS_GRACE_S
                    self._patience.deadline = min(self._patience.deadline, grace)
                await event.wait()
        if self._patience.cancelled_caught:
            log.warning("waits no longer for %s", self.waits_for or "others")
        self._say("")
        self._clients.refuse()
        self._clients.end()

    def _say(self, words: str) -> None:
        if words and words != self.waits_for:
            log.info("leaving; waits for %s, %g s at most altogether", words, self._limit)
            notify(f"STATUS=leaving; waits for {words}")
        self.waits_for = words


def handing_over(me: str, plan: Plan | None, members: Members) -> str:
    """What others have yet to do before they serve what `me` serves, in words; empty if that is
    nothing, or if nobody will."""
    if plan is None or not _stays(me, members):
        return ""
    return ", ".join(filter(None, (_of_model(me, model, members) for model in plan.models)))


def _of_model(me: str, model: ModelPlan, members: Members) -> str:
    if _serves(me, model.pipelines, members):
        return f"a plan for {model.name} without this node"
    if not _serves(me, model.retiring, members):
        return ""
    if model.state == "waiting" and not model.pipelines:
        # The others cannot serve it without this node.
        return ""
    if is_replaced(model, members):
        return f"requests for {model.name} to end or to move"
    if model.state == "outgoing":
        return f"what replaces {model.name}"
    return f"others to load {model.name}"


def _serves(me: str, pipelines: tuple[PipelinePlan, ...], members: Members) -> bool:
    """Whether `me` has a part in one of them that serves."""
    return any(
        is_loaded(pipeline, members)
        for pipeline in pipelines
        if any(stage.node == me for stage in pipeline.stages)
    )


def _stays(me: str, members: Members) -> bool:
    """Whether there is anybody else who is not about to leave, too."""
    return any(
        member.state in ("alive", "suspect") and not member.record.leaving
        for peer, member in members.items()
        if peer != me
    )


def _requests(count: int) -> str:
    if not count:
        return ""
    return f"{'a request' if count == 1 else f'{count} requests'} of its own clients to end"
