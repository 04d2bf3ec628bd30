"""Makes the cluster's plans while this node leads it."""

import logging
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from pxd.cluster.claims import all_claims
from pxd.cluster.plans import Epoch, ModelPlan, Plan
from pxd.cluster.records import ModelChoice
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.errors import ModelError
from pxd.planning.capacity import most_copies
from pxd.planning.model import ModelCost
from pxd.planning.result import PlanInputs
from pxd.serving.basis import (
    PLAN_SETTINGS,
    Key,
    basis_of,
    inputs_of,
    left_out,
    offers_key,
    taking_part,
)
from pxd.serving.beside import Order, plan_beside
from pxd.serving.handover import Handover, end_unwanted
from pxd.serving.models import ModelSource
from pxd.serving.plansync import PlanSync
from pxd.serving.readiness import Members, is_coming, is_stranded, readiness
from pxd.serving.settling import Settling
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving.planner")

LOOK_S = 0.1
"""Between looks at whether a burst of changes is over."""
RETRY_S = 30.0
SECOND_S = 30.0
LATEST_SECOND_S = 1800.0
"""Until the next look for a second pipeline where there is one alone: what was measured a moment
after a change may be far from what is usual. It doubles as long as nothing comes of it."""


class Office(msgspec.Struct, frozen=True):
    """Whether this node leads, and in which term."""

    held: bool
    term: int


class _Look(msgspec.Struct, frozen=True):
    """When a model was last planned from scratch: the nodes there were, and the other models.

    The next one for a second pipeline is `due` on trio's clock, `wait` seconds after the last.
    """

    term: int
    key: Key
    others: frozenset[str]
    due: float
    wait: float = SECOND_S


class _Failure(msgspec.Struct, frozen=True):
    """When a model could not be looked at, and who had it then."""

    at: float
    holders: list[str]
    plan: ModelPlan


class _Known(msgspec.Struct, frozen=True):
    """What a model is: a plan of it without pipelines, what planning needs, and a hint for people
    where there is a shortage."""

    model: ModelPlan
    cost: ModelCost
    hint: str = ""


class Planner:
    """Replans when the inputs of the plan in force have changed, and only then.

    A plan that another leader made and that still fits is left in force.
    """

    def __init__(
        self,
        me: str,
        models: ModelSource,
        sync: PlanSync,
        office: Callable[[], Office],
        members: Callable[[], Members],
        chosen: Callable[[], ModelChoice],
    ) -> None:
        self._me = me
        self._models = models
        self._sync = sync
        self._office = office
        self._members = members
        self._chosen = chosen
        self._handover = Handover(PLAN_SETTINGS)
        self._failures: dict[str, _Failure] = {}
        self._looks: dict[str, _Look] = {}

    async def run(self, changed: Signal) -> None:
        while True:
            event = changed.event
            rest = await self._replan() if self._office().held else float("inf")
            with trio.move_on_after(rest):
                await event.wait()
            await self._settle()

    async def _settle(self) -> None:
        """Wait for the end of a burst of changes; only while this node leads."""
        settling = Settling(trio.current_time(), self._view())
        while self._office().held:
            stranded = self._is_stranded()
            rest = settling.rest(trio.current_time(), self._view(), stranded=stranded)
            if not rest:
                break
            await trio.sleep(min(rest, LOOK_S))

    def _view(self) -> tuple[object, ...]:
        """What is different when another plan may be due, but for figures and readiness."""
        return self._chosen(), taking_part(self._members())

    def _is_stranded(self) -> bool:
        models = self._sync.plan.models if self._sync.plan else ()
        chosen, members = self._chosen().names, self._members()
        return any(model.name in chosen and is_stranded(model, members) for model in models)

    async def _replan(self) -> float:
        """Publish a plan if it differs from the one in force; say in how many seconds to look again
        even if nothing changes."""
        before, choice = self._sync.plan, self._chosen()
        orders, fixed = await self._orders(before, choice)
        made = await self._side_by_side(orders, fixed, before, choice)
        office = self._office()
        if not office.held:
            return float("inf")
        if self._sync.plan is not before:
            return 0.0
        now = trio.current_time()
        models, rest = self._handover.arrange(made, before, self._members(), now)
        rest = min(rest, RETRY_S) if fixed else rest
        rest = min([rest, *(look.due - now for look in self._looks.values() if look.due > now)])
        if before is not None and _is_same(models, before.models):
            return rest
        version = 1
        if before is not None and before.epoch.term == office.term:
            version = before.epoch.version + 1
        for model in models:
            level = logging.ERROR if model.state == "failed" else logging.INFO
            log.log(level, "planning %s: %s", model.name, model.reason or _describe_chain(model))
        await self._sync.publish(Plan(Epoch(office.term, self._me, version), tuple(models)))
        return rest

    async def _orders(
        self, before: Plan | None, choice: ModelChoice
    ) -> tuple[list[Order], list[ModelPlan]]:
        """What is to be planned, and the plans of those models that cannot be looked at."""
        orders, fixed = [], []
        names = _in_order(before, choice)
        self._failures = {name: self._failures[name] for name in names if name in self._failures}
        self._looks = {name: self._looks[name] for name in names if name in self._looks}
        for name in names:
            current = _planned(before, name)
            known = (_as_told(current) if current else None) or await self._look_at(name)
            if isinstance(known, _Known):
                orders.append(self._order(known, current))
            else:
                fixed.append(known)
        return orders, fixed

    async def _look_at(self, name: str) -> _Known | ModelPlan:
        """What the model is; a plan that says why, if it cannot be looked at."""
        failure, holders = self._failures.get(name), self._models.holders(name)
        if failure and trio.current_time() < failure.at + RETRY_S and failure.holders == holders:
            return failure.plan
        found: _Known | ModelPlan = ModelPlan(
            name=name,
            state="waiting",
            reason="it is looked at once others do without a node that is gone",
        )
        # That can take minutes, as where the hub is slow, and there is no other plan meanwhile.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_broken, nursery.cancel_scope)
            try:
                found = await self._describe(name)
            except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
                found = ModelPlan(name=name, state="failed", reason=str(error)[:2000])
                self._failures[name] = _Failure(trio.current_time(), holders, found)
            nursery.cancel_scope.cancel()
        return found

    async def _wait_broken(self, scope: trio.CancelScope) -> None:
        """Until a pipeline of the plan in force has lost a node."""
        while not any(
            readiness(pipeline, self._members()).lost
            for model in (self._sync.plan.models if self._sync.plan else ())
            for pipeline in model.pipelines
        ):
            await trio.sleep(LOOK_S)
        scope.cancel()

    async def _describe(self, name: str) -> _Known:
        description = await self._models.describe(name)
        cost = await self._models.cost(name)
        model = ModelPlan(
            name=name,
            fingerprint=description.fingerprint,
            revision=self._models.revision(name),
            layers=description.layers,
            context=description.context,
        )
        return _Known(model, cost, description.unsupported)

    def _order(self, known: _Known, current: ModelPlan | None) -> Order:
        name = known.model.name
        inputs = inputs_of(name, known.cost, self._members())
        if current is not None and current.fingerprint != known.model.fingerprint:
            current = None
        rebalance, second = self._looks_due(name, inputs, current)
        basis = basis_of(inputs, current, rebalance=rebalance, second=second)
        hints = (known.hint, left_out(name, self._members()))
        return Order(known.model, basis, before=current, hint="; ".join(filter(None, hints)))

    async def _side_by_side(
        self,
        orders: list[Order],
        fixed: list[ModelPlan],
        before: Plan | None,
        choice: ModelChoice,
    ) -> list[ModelPlan]:
        """All models, those that are to end among them: they go on where there is room for all."""
        served = before.models if before else ()
        unwanted = [m for m in served if m.name not in choice.names and m.all_pipelines]
        plan = partial(plan_beside, orders)
        reserved = all_claims((*fixed, *unwanted))
        made = alone = await trio.to_thread.run_sync(plan, reserved)
        if unwanted and any(model.state == "waiting" for model in made):
            alone = await trio.to_thread.run_sync(plan, all_claims(fixed))
        for order in orders:
            self._looked(order)
        models = [*end_unwanted(unwanted, choice, made, alone, self._members()), *fixed]
        place = {name: number for number, name in enumerate(_in_order(before, choice))}
        return sorted(models, key=lambda model: place.get(model.name, -1))

    def _looks_due(
        self, name: str, inputs: PlanInputs, current: ModelPlan | None
    ) -> tuple[bool, bool]:
        """Whether to look from scratch, and whether at least for a second pipeline.

        A look from scratch once for every set of nodes, of which those that are slow are other
        nodes, and when another model has left them, while all that serves goes on anyway. What is
        being loaded comes first: it would be given up for what nobody has loaded either.

        A new leader takes over what its predecessor has looked at.
        """
        now, term, others = trio.current_time(), self._office().term, self._others(name)
        key, look = offers_key(inputs), self._looks.get(name)
        if look is None or look.term != term:
            basis = current.basis if current is not None else None
            seen = offers_key(basis.inputs) if basis is not None else frozenset()
            look = _Look(term, seen, others, due=now + SECOND_S)
        look = msgspec.structs.replace(look, others=look.others | others)
        self._looks[name] = look
        there = {node for node, *_ in key}
        pipelines = current.pipelines if current else ()
        if any(stage.node not in there for pipeline in pipelines for stage in pipeline.stages):
            return False, False
        if any(is_coming(pipeline, self._members()) for pipeline in pipelines):
            return False, False
        if key != look.key or look.others != others:
            return True, False
        alone = len(pipelines) == 1 and now >= look.due
        return False, alone and most_copies(inputs.offers, inputs.model, inputs.settings) > 1

    def _looked(self, order: Order) -> None:
        name, basis, now = order.model.name, order.basis, trio.current_time()
        if basis.rebalance or basis.second:
            before = self._looks[name].wait
            wait = SECOND_S if basis.rebalance else min(2 * before, LATEST_SECOND_S)
            key, others = offers_key(basis.inputs), self._others(name)
            self._looks[name] = _Look(self._office().term, key, others, now + wait, wait)

    def _others(self, name: str) -> frozenset[str]:
        """The other models that have stages somewhere."""
        models = self._sync.plan.models if self._sync.plan else ()
        return frozenset(m.name for m in models if m.all_pipelines and m.name != name)


def _in_order(before: Plan | None, choice: ModelChoice) -> list[str]:
    """The chosen models: in the order of the plan in force, and new ones after those."""
    served = [m.name for m in before.models if m.all_pipelines] if before else []
    return [name for name in dict.fromkeys((*served, *choice.names)) if name in choice.names]


def _planned(plan: Plan | None, name: str) -> ModelPlan | None:
    return next((model for model in plan.models if model.name == name), None) if plan else None


def _as_told(current: ModelPlan) -> _Known | None:
    """What a plan in force says of a model that it serves: that is what everybody means by the
    name. To look at the model itself takes time, and when a leader died, clients may be waiting."""
    if not current.all_pipelines or current.basis is None:
        return None
    model = ModelPlan(
        name=current.name,
        fingerprint=current.fingerprint,
        revision=current.revision,
        layers=current.layers,
        context=current.context,
    )
    return _Known(model, current.basis.inputs.model)


def _is_same(models: list[ModelPlan], others: tuple[ModelPlan, ...]) -> bool:
    """Two failures of one model are the same plan, whatever words they come with."""

    def essence(model: ModelPlan) -> ModelPlan:
        reason = "" if model.state == "failed" else model.reason
        return msgspec.structs.replace(model, basis=None, reason=reason)

    return [essence(model) for model in models] == [essence(model) for model in others]


def _describe_chain(model: ModelPlan) -> str:
    return " | ".join(
        " -> ".join(f"{stage.node[-6:]} [{stage.start}, {stage.end})" for stage in pipeline.stages)
        for pipeline in model.pipelines
    )
