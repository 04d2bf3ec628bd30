"""Every node ends up with the same plan: pushed by the leader, pulled by whoever missed it."""

import logging
import time
from collections.abc import Callable

import trio

from pxd.cluster.adoption import Members, is_credible, later_source, may_push
from pxd.cluster.plans import Epoch, Plan, PlanStore
from pxd.cluster.soundness import flaw
from pxd.cluster.stamps import ceiling
from pxd.p2p.network import Method, Network, NetworkError

log = logging.getLogger("pxd.serving.plansync")

PUSH_TIMEOUT_S = 5.0
PULL_RETRY_S = 1.0

PUSH: Method[Plan, Epoch | None] = Method("plan.push", Plan, Epoch | None)  # type: ignore[arg-type]
PULL: Method[None, Plan | None] = Method("plan.pull", type(None), Plan | None)  # type: ignore[arg-type]


class PlanSync:
    """Holds the plan with the greatest epoch that anybody has told this node of.

    `taken` is called with every plan that replaces the one held, also with an own one. `leads`
    returns the term that this node leads, 0 for none.
    """

    def __init__(
        self,
        network: Network,
        members: Callable[[], Members],
        taken: Callable[[Plan], None],
        leads: Callable[[], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._network = network
        self._members = members
        self._taken = taken
        self._leads = leads
        self._clock = clock
        self._store = PlanStore()
        self._behind = trio.Event()
        self._unreachable = ""
        self._refused: Epoch | None = None
        network.serve(PUSH, self._serve_push)
        network.serve(PULL, self._serve_pull)

    @property
    def plan(self) -> Plan | None:
        return self._store.plan

    def offer(self, plan: Plan) -> bool:
        if not self._store.offer(plan):
            return False
        log.info("plan %s is in force", plan.epoch)
        self._taken(plan)
        return True

    async def _serve_push(self, peer: str, plan: Plan) -> Epoch | None:
        if not may_push(peer, plan, self._members()):
            log.warning("refused plan %s from %s, which is not its author", plan.epoch, peer)
        else:
            self._consider(peer, plan)
        return self._store.epoch

    def _consider(self, peer: str, plan: Plan) -> None:
        """Take a plan that somebody else has sent, if it makes sense."""
        if not self._is_credible(plan.epoch):
            log.info("refused plan %s from %s: such a plan cannot be", plan.epoch, peer)
        elif found := flaw(plan):
            log.warning("refused plan %s from %s: %s", plan.epoch, peer, found)
            self._refused = plan.epoch
        else:
            self.offer(plan)

    async def _serve_pull(self, _peer: str, _request: None) -> Plan | None:
        return self._store.plan

    async def publish(self, plan: Plan) -> None:
        """Take an own plan and tell every alive member; those not reached will pull it."""
        if not self.offer(plan):
            return
        async with trio.open_nursery() as nursery:
            for peer, member in self._members().items():
                if member.state == "alive" and peer != self._network.peer_id:
                    nursery.start_soon(self._push, peer, plan)

    async def _push(self, peer: str, plan: Plan) -> None:
        try:
            held = await self._network.call(peer, PUSH, plan, timeout=PUSH_TIMEOUT_S)
        except NetworkError as error:
            log.info("could not push plan %s to %s (it will pull it): %s", plan.epoch, peer, error)
            return
        if held is not None and held > plan.epoch:
            self._behind.set()

    def follow(self) -> None:
        """Look at the records anew: does anybody hold a later plan?"""
        if self._source() is not None:
            self._behind.set()

    def _source(self) -> str | None:
        held, members = self._store.epoch, self._members()
        refused = self._refused
        return later_source(held, members, self._unreachable, refused, self._is_credible)

    def _is_credible(self, epoch: Epoch) -> bool:
        most = ceiling(self._clock())
        return is_credible(epoch, self._network.peer_id, self._leads(), most)

    async def run(self) -> None:
        """Pull whenever a member's record shows a later plan than the one held."""
        while True:
            await self._behind.wait()
            self._behind = trio.Event()
            source = self._source()
            if source is None:
                continue
            try:
                plan = await self._network.call(source, PULL, None, timeout=PUSH_TIMEOUT_S)
            except NetworkError as error:
                log.info("could not pull a plan from %s: %s", source, error)
                self._unreachable = source
                await trio.sleep(PULL_RETRY_S)
                self._behind.set()
                continue
            if plan is not None:
                self._consider(source, plan)
