"""Every node makes the leader's plan again and says so if it comes to another."""

import logging
from collections.abc import Callable

import trio

from pxd.cluster.claims import all_claims, room
from pxd.cluster.plans import ModelPlan, Plan
from pxd.planning.model import NodeOffer
from pxd.planning.replan import decide, objective_of

log = logging.getLogger("pxd.serving.audit")

TOLERANCE = 1e-3
"""Another machine's arithmetic may break a tie in another way."""


def mismatch(plan: ModelPlan, own: NodeOffer) -> str:
    """What is wrong with a plan, in words; empty if it follows from its basis.

    `own` is what this node really offers. Takes up to seconds; never raises for any plan that can
    be decoded.
    """
    basis = plan.basis
    if basis is None or plan.state in ("outgoing", "stopped"):
        return ""
    for told in basis.inputs.offers:
        if told.id == own.id and (told.memory, told.max_layers) != (own.memory, own.max_layers):
            return "the plan counts on other memory than this node offers"
    chains = tuple(pipeline.chain for pipeline in plan.pipelines)
    try:
        expected = decide(basis).plan
        if chains == tuple(allocation.chain for allocation in expected.pipelines):
            return ""
        value = objective_of(basis.inputs, chains)
    except Exception as error:
        # What another node sends must not end this one, whatever it does to the planner.
        log.info("a plan cannot be made again", exc_info=True)
        return f"the plan cannot be made from what it says it follows from: {error}"
    if abs(value - expected.objective) <= TOLERANCE * expected.objective:
        return ""
    return (
        f"the leader's plan makes {value:.6g} of its objective, "
        f"this node's from the same basis {expected.objective:.6g}"
    )


def overcommitted(plan: Plan, own: NodeOffer) -> str:
    """Whether all that the plan puts on this node takes more than it offers, in words."""
    basis = next((model.basis for model in plan.models if model.basis is not None), None)
    if basis is None or all_claims(plan.models)[own.id] <= room(own.memory, basis.inputs.settings):
        return ""
    return "what the plan puts on this node takes more memory than it offers"


class Audit:
    """Checks the latest plan of other nodes. `report` is told the result, empty if all is well."""

    def __init__(
        self, me: str, own: Callable[[], NodeOffer], report: Callable[[str], None]
    ) -> None:
        self._me = me
        self._own = own
        self._report = report
        self._plan: Plan | None = None
        self._changed = trio.Event()

    def check(self, plan: Plan) -> None:
        """Returns at once; `run` does it."""
        self._plan = plan
        self._changed.set()

    async def run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            plan = self._plan
            if plan is None or plan.epoch.leader == self._me:
                self._report("")
                continue
            found = overcommitted(plan, self._own())
            for model in plan.models:
                found = found or await trio.to_thread.run_sync(
                    mismatch, model, self._own(), abandon_on_cancel=True
                )
            if found:
                log.warning("plan %s: %s", plan.epoch, found)
            self._report(f"plan {plan.epoch}: {found}"[:2000] if found else "")
