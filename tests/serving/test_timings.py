"""Running figures: what counts as a sample, what they make of it, and when it is news."""

import math
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan
from pxd.cluster.records import MAX_LINKS, KvBlocks, NodeRecord, PeerLink, StageReport
from pxd.engine.scheduler import Generated
from pxd.serving.timings import (
    Figure,
    HeadFigures,
    PipelineTimings,
    StageTimings,
    blocks_are_news,
    figures_to_publish,
    links_to_publish,
    moved,
    partners,
)
from pxd.wire import Row

DECODE = (Row(1, 7, 1, 1),)


def prefill(count: int, request: int = 1) -> Row:
    return Row(request, 0, count, 0)


def decode(request: int) -> Row:
    return Row(request, 7, 1, 1)


def figure(
    samples: Sequence[float], *, warm_up: int = 0, needed: int = 1, window: int = 5
) -> float:
    running = Figure(warm_up=warm_up, needed=needed, window=window)
    for sample in samples:
        running.add(sample)
    return running.value


def test_a_figure_is_the_median() -> None:
    assert figure([3, 1, 2]) == 2
    assert figure([1, 1, 1, 900, 900]) == 1
    assert figure([4, 2]) == 2


def test_a_figure_forgets() -> None:
    assert figure([1] * 5 + [8] * 3) == 8


def test_a_figure_leaves_out_the_warm_up_and_waits_for_enough() -> None:
    assert figure([9, 9, 1, 1], warm_up=2, needed=3) == 0
    assert figure([9, 9, 1, 1, 1], warm_up=2, needed=3) == 1


@pytest.mark.parametrize(
    ("rows", "decode_s", "prefill_s"),
    [
        (DECODE, 0.512, 0),
        ((Row(1, 7, 1, 0),), 0, 0),
        ((decode(1), decode(2)), 0, 0),
        ((prefill(63),), 0, 0),
        ((prefill(64),), 0, 0.008),
        ((prefill(500), *(decode(i) for i in range(12))), 0, 0.001),
        ((prefill(64), *(decode(i) for i in range(17))), 0, 0),
        ((prefill(64, 1), prefill(64, 2)), 0, 0),
        ((), 0, 0),
    ],
)
def test_which_steps_tell_how_fast_a_stage_is(
    rows: tuple[Row, ...], decode_s: float, prefill_s: float
) -> None:
    timings = StageTimings()
    for _ in range(40):
        timings.add(rows, 0.512)
    assert timings.decode_s == decode_s
    assert timings.prefill_s == prefill_s


class Session:
    """A pipeline whose steps take as long as the test says."""

    def __init__(self) -> None:
        self.timings = PipelineTimings()
        self.now = 100.0
        self.step = 0

    def run(self, rows: tuple[Row, ...], seconds: float, *tokens_of: int) -> None:
        """One step, alone in flight, that brings a token for each request of `tokens_of`."""
        self.timings.sent(self.step, rows, alone=True)
        sent, self.now = self.now, self.now + seconds
        results = [Generated(request, (5,), None) for request in tokens_of]
        self.timings.returned(self.now, self.step, sent, results)
        self.step += 1

    @property
    def figures(self) -> HeadFigures:
        return self.timings.figures


def test_the_pace_of_prompts_is_that_of_the_slowest_stage() -> None:
    session = Session()
    for _ in range(3):
        session.run((prefill(8),), 4.0)
    assert session.timings.positions_within(1.0) is None
    for _ in range(3):
        session.run((prefill(100), decode(2)), 0.505, 2)
    assert session.timings.positions_within(0.25) == 50
    # Steps that follow each other closely were under way at the same time.
    first = session.step
    for step in range(first, first + 12):
        session.timings.sent(step, (prefill(100),), alone=False)
    for step in range(first, first + 12):
        session.now += 0.1
        session.timings.returned(session.now, step, session.now - 0.3, [])
    assert session.timings.positions_within(0.25) == 250


def test_time_per_token_of_one_request_alone() -> None:
    session = Session()
    for _ in range(4):
        session.run(DECODE, 30.0, 1)
    for _ in range(15):
        session.run(DECODE, 0.5, 1)
        session.run((decode(1), decode(2)), 3.0, 1, 2)
    assert session.figures.token_s == 0
    session.run(DECODE, 0.5, 1)
    assert session.figures.token_s == 0.5


def test_passes_with_guesses_are_told_apart() -> None:
    timings = PipelineTimings()
    lone = []
    steps = [DECODE, (Row(1, 8, 5, 5),), (Row(1, 9, 5, 1),), (Row(1, 9, 5, 0),), (*DECODE, *DECODE)]
    for number, rows in enumerate(steps):
        timings.sent(number, rows, alone=True)
        lone.append(timings.returned(number + 0.5, number, number, []))
    assert lone == [(0.5, 0), (0.5, 4), None, None, None]
    for number in range(40):
        timings.sent(number, (Row(1, 8, 5, 5),), alone=True)
        timings.returned(number + 0.5, number, number, [])
    assert timings.figures.token_s == 0


def test_a_second_step_in_flight_spoils_the_sample() -> None:
    session = Session()
    for step in range(0, 60, 2):
        session.timings.sent(step, DECODE, alone=True)
        session.timings.sent(step + 1, DECODE, alone=False)
        session.timings.returned(step + 1.0, step, step, [])
        session.timings.returned(step + 2.0, step + 1, step, [])
    assert session.figures.token_s == 0


def test_time_to_the_first_token_with_the_length_of_its_prompt() -> None:
    session = Session()
    for prompt in (900, 10, 20, 30):
        session.timings.submitted(session.now, prompt, prompt, alone=True)
        session.run((prefill(prompt),), prompt / 10)
        session.run(DECODE, 1.0, prompt)
        session.run(DECODE, 1.0, prompt)
    assert session.figures.ttft_s == pytest.approx(3.0)
    assert session.figures.ttft_tokens == 20


def test_a_prompt_that_had_company_tells_nothing() -> None:
    session = Session()
    for request in range(0, 20, 2):
        session.timings.submitted(session.now, request, 10, alone=True)
        session.timings.submitted(session.now, request + 1, 10, alone=False)
        session.run((decode(request), decode(request + 1)), 1.0, request, request + 1)
    assert session.figures.ttft_s == 0


def test_tokens_per_second_count_only_time_at_work() -> None:
    session = Session()
    for _ in range(30):
        session.run(DECODE, 0.5, 1)
        session.now += 3600
    assert session.figures.tokens_per_s == pytest.approx(2.0)


def test_steps_in_flight_together_share_their_time() -> None:
    timings = PipelineTimings()
    for step in range(40):
        sent = max(step - 1.0, 0.0)
        timings.returned(step + 1.0, step, sent, [Generated(step, (5, 6), None)])
    assert timings.figures.tokens_per_s == pytest.approx(2.0)


def test_tokens_per_second_follow_the_load() -> None:
    session = Session()
    session.run(DECODE, 0.9, 1)
    assert session.figures.tokens_per_s == 0
    for _ in range(20):
        session.run(DECODE, 1.0, 1)
    for _ in range(20):
        session.run((decode(1), decode(2)), 1.0, 1, 2)
    assert session.figures.tokens_per_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(0, 0, False), (0, 1e-9, True), (10, 11.4, False), (10, 11.6, True), (10, 8.4, True)],
)
def test_what_a_move_is(old: float, new: float, expected: bool) -> None:
    assert moved(old, new, 0.15) is expected


def test_figures_are_told_when_they_appear_or_move_but_never_soon_again() -> None:
    told = {"decode_s": 0.010, "prefill_s": 0.0}
    steady = {"decode_s": 0.011, "prefill_s": 0.0}
    slower = {"decode_s": 0.020, "prefill_s": 0.0}
    complete = {"decode_s": 0.011, "prefill_s": 0.001}
    assert figures_to_publish(told, steady, since=math.inf) == {}
    assert figures_to_publish(told, slower, since=4.9) == {}
    assert figures_to_publish(told, slower, since=5.0) == {"decode_s": 0.020}
    assert figures_to_publish(told, complete, since=5.0) == complete


def test_what_is_measured_no_more_stays_as_it_was_told() -> None:
    assert figures_to_publish({"decode_s": 0.010}, {"decode_s": 0.0}, since=math.inf) == {}


@pytest.mark.parametrize(
    ("told", "now", "since", "news"),
    [
        (None, None, math.inf, False),
        (None, KvBlocks(160, 160, 0), 0, True),
        (KvBlocks(160, 160, 0), None, 0, True),
        (KvBlocks(160, 160, 0), KvBlocks(320, 320, 0), 0, True),
        (KvBlocks(160, 160, 0), KvBlocks(160, 159, 0), 0, True),
        (KvBlocks(160, 159, 0), KvBlocks(160, 160, 1), 0, True),
        (KvBlocks(160, 150, 0), KvBlocks(160, 141, 0), 9.9, False),
        (KvBlocks(160, 150, 0), KvBlocks(160, 141, 0), 10, True),
        (KvBlocks(160, 150, 0), KvBlocks(160, 140, 0), 0, True),
        (KvBlocks(160, 160, 0), KvBlocks(160, 160, 9), 9.9, False),
        (KvBlocks(160, 160, 9), KvBlocks(160, 160, 9), math.inf, False),
    ],
)
def test_which_kv_blocks_are_news(
    told: KvBlocks | None, now: KvBlocks | None, since: float, news: bool
) -> None:
    assert blocks_are_news(told, now, since=since) is news


def plan(*chains: str) -> Plan:
    pipelines = tuple(
        PipelinePlan(chain, tuple(StagePlan(node, i, i + 1) for i, node in enumerate(chain)))
        for chain in chains
    )
    return Plan(Epoch(1, "a", 1), (ModelPlan(name="m", pipelines=pipelines),))


def test_partners_are_the_nodes_of_the_same_pipelines() -> None:
    assert partners(plan("abc", "de", "fa"), "a") == {"b", "c", "f"}
    assert partners(plan("abc"), "x") == frozenset()
    assert partners(None, "a") == frozenset()


def publish(
    told: dict[str, float],
    measured: dict[str, float],
    *,
    partners: str = "",
    since: float = math.inf,
) -> dict[str, float] | None:
    """The new figures, None if those told before stay."""
    before = tuple(PeerLink(peer, rtt) for peer, rtt in told.items())
    after = links_to_publish(before, measured, {}, partners, since=since)
    return None if after is before else {item.peer: item.rtt for item in after}


def test_round_trip_times_are_told_when_peers_come_and_go() -> None:
    assert publish({}, {}) is None
    assert publish({}, {"b": 0.002}) == {"b": 0.002}
    assert publish({"b": 0.002}, {"b": 0.002, "c": 0.001}) == {"b": 0.002, "c": 0.001}
    assert publish({"b": 0.002, "c": 0.001}, {"c": 0.001}) == {"c": 0.001}


def test_round_trip_times_are_told_when_they_move_clearly() -> None:
    assert publish({"b": 0.040}, {"b": 0.050}) is None
    assert publish({"b": 0.040}, {"b": 0.053}) == {"b": 0.053}
    assert publish({"b": 0.0005}, {"b": 0.0014}) is None, "within what the daemons take themselves"


def test_round_trip_times_are_not_told_soon_again() -> None:
    assert publish({"b": 0.040}, {"b": 0.090}, since=9.9) is None
    assert publish({"b": 0.040}, {"b": 0.090}, since=10.0) == {"b": 0.090}


def test_partners_come_first_then_the_nearest() -> None:
    near = {f"n{i:02}": 0.001 * (i + 1) for i in range(40)}
    told = publish({}, {**near, "z": 0.5}, partners="z")
    assert told is not None
    assert set(told) == {"z", *sorted(near)[: MAX_LINKS - 1]}


def test_equals_do_not_take_turns() -> None:
    measured = {f"n{i:02}": 0.010 for i in range(40)}
    told = publish({}, measured)
    assert told is not None
    assert publish(told, {**measured, "n39": 0.009}) is None
    moved_in = publish(told, {**measured, "n39": 0.006})
    assert moved_in is not None
    assert "n39" in moved_in


def test_bandwidths_are_told_when_they_are_new_or_move_clearly() -> None:
    rtts = {"b": 0.001, "c": 0.002}
    told = links_to_publish((), rtts, {"x": 1.0}, "", since=math.inf)
    assert told == (PeerLink("b", 0.001), PeerLink("c", 0.002))
    known = links_to_publish(told, rtts, {"b": 0.1}, "", since=math.inf)
    assert known == (PeerLink("b", 0.001, 0.1), PeerLink("c", 0.002))
    assert links_to_publish(known, rtts, {"b": 0.12}, "", since=math.inf) is known
    assert links_to_publish(known, rtts, {"b": 0.13}, "", since=9.0) is known
    moved = links_to_publish(known, rtts, {"b": 0.13}, "", since=math.inf)
    assert moved[0].bandwidth == 0.13
    # What is not known at the moment, say after the peer was away, is as it was.
    assert links_to_publish(moved, rtts, {}, "", since=math.inf) is moved


times = st.floats(0, 10)
peers = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), times, max_size=60)


@given(peers, peers, st.sets(st.text("abcdefgh", min_size=1, max_size=1)))
def test_what_is_told_fits_a_record_and_is_not_told_twice(
    earlier: dict[str, float], measured: dict[str, float], near: set[str]
) -> None:
    told = links_to_publish((), earlier, earlier, near, since=math.inf)
    news = links_to_publish(told, measured, measured, near, since=math.inf)
    record = NodeRecord(id="a", name="a", links=news)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=NodeRecord) == record
    assert {item.peer for item in news} <= measured.keys()
    assert len(news) == min(len(measured), MAX_LINKS)
    if len(near & measured.keys()) <= MAX_LINKS:
        assert near & measured.keys() <= {item.peer for item in news}
    assert links_to_publish(news, measured, measured, near, since=math.inf) is news


def test_records_of_nodes_that_measure_nothing_are_read() -> None:
    stage = {"model": "m", "pipeline": "p", "start": 0, "end": 1, "state": "ready"}
    old = msgspec.msgpack.encode({"id": "a", "name": "a", "stages": [stage]})
    record = msgspec.msgpack.decode(old, type=NodeRecord)
    assert record.links == ()
    assert record.stages == (
        StageReport(model="m", pipeline="p", start=0, end=1, state="ready", decode_s=0.0),
    )


@pytest.mark.parametrize(
    "rtts", [[["b", 0.1]] * (MAX_LINKS + 1), [["b", -1.0]], [["b", math.nan]], [["", 0.1]]]
)
def test_records_that_claim_nonsense_are_refused(rtts: list[list[object]]) -> None:
    data = msgspec.msgpack.encode({"id": "a", "name": "a", "links": rtts})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=NodeRecord)
