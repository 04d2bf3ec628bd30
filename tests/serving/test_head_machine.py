"""A head under any order of events: every request it has taken ends once, with a named cause."""

from collections import deque
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import trio
from hypothesis import event, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from pxd.cluster.plans import PipelinePlan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Admission
from pxd.executors.rows import draws_of
from pxd.p2p.network import CallFailed
from pxd.serving import head as head_module
from pxd.serving.head import Head, Submission
from pxd.wire import Buffer, Nack, Output, Sampled, SampledToken, Sampling, Step

from .harness import Member

EOS = 96
STAGES = (StagePlan("a", 0, 3), StagePlan("b", 3, 6))
PIPELINE = PipelinePlan("p", STAGES)
READY = StageReport(
    model="m", pipeline="p", start=0, end=3, state="ready", kv_tokens=8 * BLOCK_TOKENS
)
CAUSES = (
    "deadline: ",
    "executor-died: ",
    "executor-failed: ",
    "not begun: ",
    "unreachable: ",
    "the plan no longer has this pipeline",
)


WAYS = {cause.split(":")[0] for cause in CAUSES} | {
    *("stop", "length", "cancelled", "nobody's", "not-ready", "overloaded", "never-fits")
}


class Watched:
    """A head, and the books about it. Time only passes when it is told to."""

    def __init__(self, admission: Admission, clock: MockClock) -> None:
        self.clock = clock
        self.flying: deque[Step] = deque()
        self.head = Head(PIPELINE, self.feed, self.emit, "a", admission, "off")
        self.members = {
            stage.node: Member(NodeRecord(id=stage.node, name=stage.node, stages=(READY,)))
            for stage in STAGES
        }
        self.alive: dict[tuple[str, str], int] = {}
        self.ended: dict[tuple[str, str], str] = {}
        self.deadlines: dict[tuple[str, str], float] = {}
        self.asked = 0

    async def feed(self, peer: str, step: Step, body: Buffer) -> None:
        self.flying.append(step)

    def emit(self, peer: str, output: Output) -> None:
        """Whatever is said is of a request that is here, and goes on where it was."""
        key = peer, output.request
        assert key in self.alive, "nothing comes after the end"
        assert output.index == self.alive[key]
        self.alive[key] += len(output.tokens)
        if output.finish is not None or output.failure is not None:
            assert output.finish is None or output.failure is None
            assert output.failure is None or output.failure.startswith(CAUSES)
            self.end(key, output.finish or str(output.failure).split(":")[0])

    def end(self, key: tuple[str, str], how: str) -> None:
        del self.alive[key]
        self.ended[key] = how
        event(how)

    def somebody_asks(self, peer: str, length: int, new: int, timeout: int, priority: int) -> None:
        self.asked += 1
        key = peer, f"r{self.asked}"
        generated = length // 3
        submission = Submission(
            pipeline="p",
            request=key[1],
            tokens=(self.asked,) * length,
            generated=generated,
            max_new=new,
            sampling=Sampling(),
            eos=(EOS,),
            priority=priority,
            timeout=float(timeout),
        )
        self.alive[key] = generated
        try:
            self.head.submit(peer, submission)
        except CallFailed as error:
            self.end(key, error.code)
        else:
            self.deadlines[key] = trio.current_time() + timeout

    def somebody_asks_twice(self, peer: str) -> None:
        names = [name for owner, name in self.alive if owner == peer]
        if names:
            again = Submission(
                pipeline="p",
                request=names[0],
                tokens=(1,),
                generated=0,
                max_new=1,
                sampling=Sampling(),
                eos=(),
            )
            with pytest.raises(CallFailed, match="duplicate"):
                self.head.submit(peer, again)

    def somebody_leaves(self, which: int) -> None:
        keys = [*self.alive, *self.ended]
        if keys:
            key = keys[which % len(keys)]
            if key in self.alive:
                self.end(key, "cancelled")
            self.head.cancel(*key)

    def an_ingress_is_gone(self, peer: str) -> None:
        for key in [key for key in self.alive if key[0] == peer]:
            self.end(key, "nobody's")
        self.head.cancel_all_of(peer)

    def a_step_returns(self, last: bool) -> None:
        """With `last`, every request in it has come to its end."""
        if self.flying:
            step = self.flying.popleft()
            tokens = tuple(
                SampledToken(request, position, EOS if last else 5)
                for request, position in draws_of(step.rows)
            )
            frame = Sampled(pipeline="p", session=step.session, step=step.step, tokens=tokens)
            self.head.sampled(frame)
            self.head.sampled(frame)
            self.head.sampled(replace(frame, session=frame.session + 1))

    def a_step_fails(self, code: str) -> None:
        if self.flying:
            step = self.flying.popleft()
            self.head.nack(
                Nack(pipeline="p", session=step.session, step=step.step, code=code, reason="so")  # type: ignore[arg-type]
            )

    def a_stage_restarts(self) -> None:
        member = self.members["b"]
        for state in ("restarting", "ready"):
            member.record = replace(member.record, stages=(replace(READY, state=state),))
            self.head.follow(self.members)

    def a_connection_is_lost(self) -> None:
        self.head.connection_lost("b")
        self.head.follow(self.members)

    def time_passes(self, seconds: int) -> None:
        self.clock.jump(seconds)

    def is_sound(self) -> None:
        now = trio.current_time()
        assert set(self.alive) == set(self.head._numbers), "each is here or has ended"
        assert len(self.head._clients) == len(self.alive)
        assert all(self.deadlines[key] > now for key in self.alive), "nobody is kept too long"
        self.head.heartbeat()

    async def run(self, events: list[tuple[str, tuple[Any, ...]]]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.head.run)
            for name, arguments in events:
                act: Callable[..., None] = getattr(self, name)
                act(*arguments)
                await wait_all_tasks_blocked()
                self.is_sound()
            self.head.cancel_scope.cancel()
        assert not self.alive
        assert len(self.ended) == self.asked
        assert set(self.ended.values()) <= WAYS
        for quota in (self.head._requests, self.head._tokens):
            assert not quota._held


peers = st.sampled_from(["x", "y"])
codes = st.sampled_from(["executor-failed", "executor-failed", "executor-died"])
asking = st.tuples(
    st.just("somebody_asks"),
    st.tuples(
        peers,
        st.integers(1, 9 * BLOCK_TOKENS),
        st.integers(1, 60),
        st.integers(1, 60),
        st.integers(-2, 2),
    ),
)
single = st.one_of(
    asking,
    asking,
    st.tuples(st.just("a_step_returns"), st.tuples(st.booleans())),
    st.tuples(st.just("somebody_asks_twice"), st.tuples(peers)),
    st.tuples(st.just("somebody_leaves"), st.tuples(st.integers(0, 99))),
    st.tuples(st.just("an_ingress_is_gone"), st.tuples(peers)),
    st.tuples(st.just("a_step_fails"), st.tuples(codes)),
    st.tuples(st.just("a_stage_restarts"), st.just(())),
    st.tuples(st.just("a_connection_is_lost"), st.just(())),
    st.tuples(st.just("time_passes"), st.tuples(st.integers(1, 20))),
)
work = st.integers(1, 20).map(lambda count: [("a_step_returns", (False,))] * count)
events = st.lists(st.one_of(single.map(lambda one: [one]), work), min_size=15, max_size=60).map(
    lambda groups: list(chain.from_iterable(groups))
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(["reserve", "preempt"]), st.sampled_from([4, 100]), events)
def test_every_request_ends_once_with_a_named_cause(
    admission: Admission, limit: int, events: list[tuple[str, tuple[Any, ...]]]
) -> None:
    async def main() -> None:
        watched = Watched(admission, clock)
        watched.head.follow(watched.members)
        await watched.run(events)

    clock = MockClock()
    before, head_module.MAX_REQUESTS = head_module.MAX_REQUESTS, limit
    try:
        trio.run(main, clock=clock)
    finally:
        head_module.MAX_REQUESTS = before
