"""All pipelines that this node heads, and the way of their tokens back to the ingresses."""

import logging

import trio

from pxd.cluster.plans import Plan
from pxd.cluster.records import KvBlocks
from pxd.engine.continuous import Admission
from pxd.p2p.network import CallFailed, Network, NetworkError
from pxd.planning.routing.replicas import tier_of
from pxd.serving.head import MAX_REQUESTS, SUBMIT, Accepted, Feed, FeedNow, Head, Submission
from pxd.serving.outbox import Outbox
from pxd.serving.readiness import Members
from pxd.serving.speculation import Speculate
from pxd.serving.timings import HeadFigures
from pxd.wire import Cancel, Copied, Nack, Output, Sampled

log = logging.getLogger("pxd.serving.head")

HEARTBEAT_S = 5.0
OUTBOX_REQUESTS = 2 * MAX_REQUESTS
"""All requests of a pipeline may end at once, while others have just begun."""

OUTPUT_RETRIES_S = (0.1, 0.5, *(1.0,) * 7)
"""An ingress that is restarted before it is missed waits no longer for its first tokens."""


class HeadHost:
    """All pipelines whose stage 0 is on this node."""

    def __init__(
        self,
        network: Network,
        feed: Feed,
        admission: Admission = "preempt",
        speculate: Speculate = "auto",
        feed_now: FeedNow = lambda *_: False,
    ) -> None:
        self._network = network
        self._feed = feed
        self._feed_now = feed_now
        self._admission: Admission = admission
        self.speculate: Speculate = speculate
        self._heads: dict[str, Head] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._nursery: trio.Nursery | None = None
        network.serve(SUBMIT, self._submit)

    @property
    def running(self) -> int:
        return sum(head.running for head in self._heads.values())

    @property
    def waiting(self) -> int:
        return sum(head.waiting for head in self._heads.values())

    @property
    def kv_tier(self) -> int:
        """How short the fullest is of KV blocks; see `NodeRecord`."""
        found = (blocks for blocks in self.blocks().values() if blocks and blocks.total)
        return max((tier_of(each.total - each.free, each.total) for each in found), default=0)

    def figures(self) -> dict[str, HeadFigures]:
        """What has been measured of every headed pipeline, by its id."""
        return {key: head.figures for key, head in self._heads.items()}

    def blocks(self) -> dict[str, KvBlocks | None]:
        """The KV blocks of every headed pipeline, by its id."""
        return {key: head.blocks for key, head in self._heads.items()}

    def loads(self) -> dict[str, int]:
        """How many requests every headed pipeline holds, by its id."""
        return {key: head.running + head.waiting for key, head in self._heads.items()}

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(HEARTBEAT_S)
                for head in list(self._heads.values()):
                    head.heartbeat()

    def apply(self, plan: Plan) -> None:
        """Follow a new plan: pipelines it keeps go on, others are closed or begun."""
        assert self._nursery is not None, "run must have started"
        me = self._network.peer_id
        wanted = {
            pipeline.id: pipeline
            for model in plan.models
            for pipeline in model.all_pipelines
            if pipeline.head == me
        }
        for key in self._heads.keys() - wanted.keys():
            self._heads.pop(key).cancel_scope.cancel()
        for key in wanted.keys() - self._heads.keys():
            head = Head(
                wanted[key],
                self._feed,
                self._emit,
                me,
                self._admission,
                self.speculate,
                self._feed_now,
            )
            self._heads[key] = head
            self._nursery.start_soon(head.run)

    def follow(self, members: Members) -> None:
        """Look at the cluster anew; call it whenever a record or a member's state changed."""
        for head in self._heads.values():
            head.follow(members)

    def connection_lost(self, peer: str) -> None:
        """The network lost a peer for now; call `follow` afterwards to open new sessions."""
        for head in self._heads.values():
            head.connection_lost(peer)

    def peer_gone(self, peer: str) -> None:
        """`peer` is dead or has left: its requests are nobody's now."""
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            outbox.close()
        for head in self._heads.values():
            head.cancel_all_of(peer)

    async def _submit(self, peer: str, submission: Submission) -> Accepted:
        head = self._heads.get(submission.pipeline)
        if head is None:
            raise CallFailed("unknown-pipeline", "this node does not head that pipeline (any more)")
        return head.submit(peer, submission)

    def cancel(self, peer: str, frame: Cancel) -> None:
        for head in self._heads.values():
            head.cancel(peer, frame.request)

    def sampled(self, peer: str, frame: Sampled) -> None:
        head = self._heads.get(frame.pipeline)
        if head is not None and peer == head.pipeline.tail:
            head.sampled(frame)

    def copied(self, peer: str, frame: Copied) -> None:
        head = self._heads.get(frame.pipeline)
        nodes = [stage.node for stage in head.pipeline.stages] if head is not None else []
        if head is not None and peer in nodes:
            head.copied(nodes.index(peer), frame)

    def nack(self, peer: str, frame: Nack) -> None:
        head = self._heads.get(frame.pipeline)
        if head is not None and any(stage.node == peer for stage in head.pipeline.stages):
            head.nack(frame, peer)

    def _emit(self, peer: str, output: Output) -> None:
        """Hand tokens to the ingress' own sender, so that a slow ingress holds back nobody else."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            assert self._nursery is not None
            outbox = self._outboxes[peer] = Outbox(OUTBOX_REQUESTS)
            self._nursery.start_soon(self._send_outputs, peer, outbox)
        if not outbox.put(output):
            log.warning("ingress %s does not keep up; its requests are dropped here", peer)
            self.peer_gone(peer)

    async def _send_outputs(self, peer: str, outbox: Outbox) -> None:
        while (output := await outbox.get()) is not None:
            if await self._bring(peer, output, outbox.closed):
                continue
            if not outbox.closed.is_set():
                self.peer_gone(peer)
            return

    async def _bring(self, peer: str, output: Output, gone: trio.Event) -> bool:
        """False if it cannot be brought, or `peer` is gone meanwhile: whoever is there under this
        name later knows nothing of it."""
        for number, pause in enumerate(OUTPUT_RETRIES_S):
            try:
                await self._network.send(peer, output)
            except NetworkError as error:
                # Sending twice is harmless: tokens carry their index.
                if number == 0:
                    log.warning("cannot bring tokens to ingress %s: %s", peer, error)
                with trio.move_on_after(pause):
                    await gone.wait()
                    return False
            else:
                return True
        return False
