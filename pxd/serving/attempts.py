"""The submissions of this node's requests that are under way, and what heads send for them."""

import contextlib
import logging
import math
from collections.abc import Iterator

import trio

from pxd.cluster.plans import PipelinePlan
from pxd.p2p.network import Network, NetworkError
from pxd.serving.failures import TOO_SLOW
from pxd.serving.quota import Quota
from pxd.serving.readiness import Members, stage_report
from pxd.wire import Cancel, Output

log = logging.getLogger("pxd.serving.ingress")

SUBMIT_TIMEOUT_S = 10.0
STRAY_S = 5.0
MAX_STRAYS = 1024
MAX_REFUSING = 64

MAX_UNREAD = 256 << 20
OUTPUT_BYTES, TOKEN_BYTES, SCORE_BYTES = 240, 40, 120
"""Of memory that an output of a head takes here: itself, each of its tokens, and each of their
log probabilities."""

Lives = tuple[tuple[float, int], ...]
"""Per stage, when its node was started and how often its executor was restarted."""


class Attempt:
    """One submission of a request to one head, which may take `tokens` positions there.

    `began`, and `heard`, when its head sent the last word, are on trio's clock. `submitting` is the
    scope to submit it in: there is nothing to wait for once it is lost. One that `stays` is not
    moved because of a mere suspicion. `lives` are those of the executors that it was meant for: who
    loses two attempts with the same has seen one death, told twice.
    """

    def __init__(
        self,
        name: str,
        model: str,
        pipeline: PipelinePlan,
        tokens: int,
        members: Members,
        unread: Quota,
    ) -> None:
        """`unread` bounds what all attempts of this node have not taken yet, in bytes."""
        self.name = name
        self.model = model
        self.pipeline = pipeline.id
        self.head = pipeline.head
        self.nodes = frozenset(stage.node for stage in pipeline.stages)
        self.tokens = tokens
        self.started = members[pipeline.head].record.started
        self.lives = _lives(pipeline, members)
        self.began = self.heard = trio.current_time()
        self.submitting = trio.CancelScope()
        self.fruitful = False
        self.lost = False
        self.stays = False
        self._unread = unread
        self._send, self._outputs = trio.open_memory_channel[Output](math.inf)

    def put(self, output: Output) -> None:
        """For `get` to return. Where its client does not take what is there already, and others
        want room for what they have not taken, all of it is given up."""
        if self.lost:
            return
        if output.failure is not None or self._unread.take(self.name, _size(output)):
            self._send.send_nowait(output)
        else:
            log.warning("request %s is given up: its client is too slow", self.name)
            self._forget()
            self.fail(f"{TOO_SLOW}: the client takes its answer too slowly")

    def fail(self, reason: str) -> None:
        """Nothing follows what is there already."""
        if not self.lost:
            self.lost = True
            self.submitting.cancel()
            self._send.send_nowait(Output(request=self.name, index=0, failure=reason))

    def get_nowait(self) -> Output:
        """Raises `trio.WouldBlock`."""
        return self._took(self._outputs.receive_nowait())

    async def get(self) -> Output:
        return self._took(await self._outputs.receive())

    def _took(self, output: Output) -> Output:
        if output.failure is None:
            self._unread.give_back(self.name, _size(output))
        return output

    def close(self) -> None:
        self.lost = True
        self._forget()

    def _forget(self) -> None:
        with contextlib.suppress(trio.WouldBlock):
            while True:
                self.get_nowait()


def _size(output: Output) -> int:
    """About how many bytes it takes."""
    scores = sum(1 + len(each.top) for each in output.logprobs)
    return OUTPUT_BYTES + TOKEN_BYTES * len(output.tokens) + SCORE_BYTES * scores


def _lives(pipeline: PipelinePlan, members: Members) -> Lives:
    records = [members[stage.node].record for stage in pipeline.stages if stage.node in members]
    reports = [(record.started, stage_report(record, pipeline.id)) for record in records]
    return tuple((started, report.restarts if report else 0) for started, report in reports)


class Attempts:
    """All of this node. Works while `run` runs."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._open: dict[str, Attempt] = {}
        self._unread = Quota(MAX_UNREAD)
        self._strays: dict[str, float] = {}
        self._refusing = 0
        self._nursery: trio.Nursery | None = None

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Attempt]:
        return iter(self._open.values())

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Answers that are left during the daemon's own end cancel nothing any more.
                self._nursery = None

    def open(
        self, name: str, model: str, pipeline: PipelinePlan, tokens: int, members: Members
    ) -> Attempt:
        attempt = Attempt(name, model, pipeline, tokens, members, self._unread)
        self._open[name] = attempt
        return attempt

    def close(self, attempt: Attempt, *, cancel: bool) -> None:
        attempt.close()
        self._open.pop(attempt.name, None)
        if cancel and self._nursery is not None:
            self._nursery.start_soon(self._cancel, attempt.head, attempt.name)

    def follow(self, members: Members) -> None:
        """Those whose head is gone or was restarted are lost."""
        for attempt in self._open.values():
            head = members.get(attempt.head)
            if head is None or head.state in ("dead", "left"):
                attempt.fail("its head is gone")
            elif head.record.started != attempt.started:
                attempt.fail("its head was restarted")

    def connection_lost(self, peer: str) -> None:
        """The network lost a peer for now: what a head there has sent may be lost too."""
        for attempt in self._open.values():
            if attempt.head == peer:
                attempt.fail("unreachable: lost the connection to the head")

    def output(self, peer: str, frame: Output) -> None:
        attempt = self._open.get(frame.request)
        if attempt is None:
            if frame.finish is None and frame.failure is None:
                self._refuse_stray(peer, frame.request)
        elif attempt.head == peer:
            attempt.heard = trio.current_time()
            attempt.put(frame)

    def _refuse_stray(self, peer: str, request: str) -> None:
        """A head works for nobody: the cancellation was lost, or was faster than the submission."""
        now = trio.current_time()
        if now - self._strays.get(request, -math.inf) < STRAY_S or self._nursery is None:
            return
        if self._refusing >= MAX_REFUSING:
            # It will come again if it is real.
            return
        if len(self._strays) >= MAX_STRAYS:
            self._strays.clear()
        self._strays[request] = now
        self._refusing += 1
        self._nursery.start_soon(self._refuse, peer, request)

    async def _refuse(self, peer: str, request: str) -> None:
        try:
            await self._cancel(peer, request)
        finally:
            self._refusing -= 1

    async def _cancel(self, head: str, request: str) -> None:
        try:
            with trio.move_on_after(SUBMIT_TIMEOUT_S):
                await self._network.send(head, Cancel(request=request))
        except NetworkError as error:
            log.info("could not cancel %s at its head: %s", request, error)
