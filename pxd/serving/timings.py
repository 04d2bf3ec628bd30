"""Running figures of how fast this node really serves. No clock: callers bring the times.

Times are in seconds. A figure of 0 stands for "not measured yet".
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from pxd.cluster.plans import Plan
from pxd.cluster.records import MAX_LINKS, KvBlocks, PeerLink
from pxd.engine.scheduler import Generated
from pxd.wire import Row

CHUNK_POSITIONS = 64
CHUNK_SHARE = 0.8
PACE_POSITIONS = 32
STEPS_KEPT = 64
RATE_SPAN_S = 5.0
RATE_LEAST_S = 1.0

FIGURES_EVERY_S = 5.0
FIGURES_SHARE = 0.15
BLOCKS_EVERY_S = 10.0
BLOCKS_SHARE = 16
RTTS_EVERY_S = 10.0
RTTS_SHARE = 0.3
RTTS_LEAST_S = 0.001
BANDWIDTH_SHARE = 0.25


class Figure:
    """The median of the latest `window` samples, so that a pause now and then does not count.

    The first `warm_up` samples are left out, and `needed` more must have come.
    """

    __slots__ = ("_needed", "_samples", "_to_skip")

    def __init__(self, *, warm_up: int, needed: int, window: int) -> None:
        self._to_skip = warm_up
        self._needed = needed
        self._samples: deque[float] = deque(maxlen=window)

    def add(self, sample: float) -> None:
        if self._to_skip:
            self._to_skip -= 1
        else:
            self._samples.append(sample)

    @property
    def known(self) -> bool:
        return len(self._samples) >= self._needed

    @property
    def value(self) -> float:
        if not self.known:
            return 0.0
        return sorted(self._samples)[(len(self._samples) - 1) // 2]


def _decode_figure() -> Figure:
    # More than one answer's tokens, for they slow down as the context grows.
    return Figure(warm_up=4, needed=16, window=128)


def _prompt_figure() -> Figure:
    return Figure(warm_up=1, needed=2, window=16)


def is_lone_decode(rows: Sequence[Row]) -> bool:
    """Whether a step draws the next token of one request and does nothing else."""
    return len(rows) == 1 and rows[0].count == 1 and rows[0].draws == 1


class LonePass(NamedTuple):
    """A step that had the pipeline for itself and drew tokens of one request, all but the first
    behind `guesses`."""

    seconds: float
    guesses: int


class StageTimings:
    """One loaded stage: a decode step of one request, and a prompt token within a long chunk."""

    def __init__(self) -> None:
        self._decode = _decode_figure()
        self._prefill = _prompt_figure()

    def add(self, rows: Sequence[Row], seconds: float) -> None:
        """A step took `seconds` from its arrival at the idle stage to its result."""
        if is_lone_decode(rows):
            self._decode.add(seconds)
            return
        counts = [row.count for row in rows]
        longest, total = max(counts, default=0), sum(counts)
        if longest >= CHUNK_POSITIONS and longest >= CHUNK_SHARE * total:
            self._prefill.add(seconds / total)

    @property
    def decode_s(self) -> float:
        return self._decode.value

    @property
    def prefill_s(self) -> float:
        return self._prefill.value


class HeadFigures(msgspec.Struct, frozen=True):
    """How fast a pipeline is, as its head sees it.

    `token_s` runs from sending a decode step to the return of its token, `ttft_s` from the
    submission of a prompt of about `ttft_tokens` to its first token; both for one request alone.
    `tokens_per_s` is of the time in which steps were under way, whatever their load was.
    """

    token_s: float = 0.0
    ttft_s: float = 0.0
    ttft_tokens: int = 0
    tokens_per_s: float = 0.0


class _WorkRate:
    """Tokens per second of work, over the last one to two spans of `RATE_SPAN_S` of it."""

    __slots__ = ("_earlier", "_seconds", "_tokens")

    def __init__(self) -> None:
        self._earlier = (0.0, 0)
        self._seconds, self._tokens = 0.0, 0

    def add(self, seconds: float, tokens: int) -> None:
        self._seconds += seconds
        self._tokens += tokens
        if self._seconds >= RATE_SPAN_S:
            self._earlier = (self._seconds, self._tokens)
            self._seconds, self._tokens = 0.0, 0

    @property
    def value(self) -> float:
        seconds, tokens = self._earlier[0] + self._seconds, self._earlier[1] + self._tokens
        return tokens / seconds if seconds >= RATE_LEAST_S else 0.0


class PipelineTimings:
    """One session of a pipeline at its head. Steps return in the order in which they were sent."""

    def __init__(self) -> None:
        self._token = _decode_figure()
        self._ttft = _prompt_figure()
        self._prompt = _prompt_figure()
        self._rate = _WorkRate()
        self._lone_step: tuple[int, int] | None = None
        self._lone_prompt: tuple[int, int, float] | None = None
        self._last_return = 0.0
        self._positions: dict[int, int] = {}
        self._pace = Figure(warm_up=1, needed=2, window=8)

    def submitted(self, now: float, request: int, prompt: int, *, alone: bool) -> None:
        """A request with `prompt` tokens came in; `alone` says that the head had no other."""
        self._lone_prompt = (request, prompt, now) if alone else None

    def sent(self, step: int, rows: Sequence[Row], *, alone: bool) -> None:
        """A step went out; `alone` says that no other is in flight."""
        draws = rows[0].draws if len(rows) == 1 and rows[0].draws == rows[0].count else 0
        self._lone_step = (step, draws - 1) if alone and draws else None
        positions = sum(row.count for row in rows)
        if positions >= PACE_POSITIONS:
            self._positions[step] = positions
            # Steps that failed never return.
            self._positions.pop(step - STEPS_KEPT, None)

    def returned(
        self, now: float, step: int, sent: float, results: Sequence[Generated]
    ) -> LonePass | None:
        """The tokens of `step` are here, which was sent at `sent`."""
        lone = None
        if self._lone_step is not None and step == self._lone_step[0]:
            lone = LonePass(now - sent, self._lone_step[1])
            if not lone.guesses:
                self._token.add(lone.seconds)
        positions = self._positions.pop(step, 0)
        if positions:
            self._pace.add((now - max(sent, self._last_return)) / positions)
        tokens = sum(len(result.tokens) for result in results)
        self._rate.add(now - max(sent, self._last_return), tokens)
        self._last_return = now
        if self._lone_prompt is not None:
            request, prompt, submitted = self._lone_prompt
            if any(result.request == request for result in results):
                self._ttft.add(now - submitted)
                self._prompt.add(prompt)
                self._lone_prompt = None
        return lone

    def positions_within(self, seconds: float) -> int | None:
        """How many positions of prompts a step may have so that the next one is not held up longer
        than that; None while it is not known."""
        return int(seconds / self._pace.value) if self._pace.value else None

    @property
    def figures(self) -> HeadFigures:
        return HeadFigures(
            token_s=self._token.value,
            ttft_s=self._ttft.value,
            ttft_tokens=int(self._prompt.value),
            tokens_per_s=self._rate.value,
        )


def moved(old: float, new: float, share: float) -> bool:
    """Whether `new` differs from what was told before by more than `share` of it."""
    return abs(new - old) > share * old


def figures_to_publish(
    told: Mapping[str, float], measured: Mapping[str, float], *, since: float
) -> dict[str, float]:
    """Those of `measured` that the cluster should hear of; none while nothing is new.

    A record travels to every node, so news is what appears or moves clearly, and the last one must
    be `since` seconds old. What is not measured (again) yet leaves what was told in place.
    """
    known = {name: value for name, value in measured.items() if value > 0}
    news = any(moved(told.get(name, 0.0), value, FIGURES_SHARE) for name, value in known.items())
    return known if news and since >= FIGURES_EVERY_S else {}


def blocks_are_news(told: KvBlocks | None, now: KvBlocks | None, *, since: float) -> bool:
    """Whether the cluster should hear of a pipeline's KV blocks; the last news is `since` seconds
    old. That all are back is told at once."""
    if told is None or now is None or told.total != now.total:
        return told != now
    if (told.free == told.total) != (now.free == now.total):
        return True
    far = abs(now.free - told.free) * BLOCKS_SHARE >= now.total
    return told != now and (far or since >= BLOCKS_EVERY_S)


def partners(plan: Plan | None, node: str) -> frozenset[str]:
    """The other nodes of all pipelines that `node` is part of."""
    chains = [
        {stage.node for stage in pipeline.stages}
        for model in (plan.models if plan else ())
        for pipeline in model.all_pipelines
    ]
    return frozenset().union(*(chain for chain in chains if node in chain)) - {node}


def links_to_publish(
    told: tuple[PeerLink, ...],
    rtts: Mapping[str, float],
    bandwidths: Mapping[str, float],
    partners: Collection[str],
    *,
    since: float,
) -> tuple[PeerLink, ...]:
    """What lies between this node and others, for its record; `told` itself while that is good.

    `rtts` holds those to all live peers, `bandwidths` what was measured in GB/s, and `since` is how
    long ago `told` was published. Where there are too many, those to `partners` come first and then
    the shortest; a peer already told of gives way only to one that is clearly nearer, so that
    equals do not take turns.
    """
    if since < RTTS_EVERY_S:
        return told
    before = {item.peer: item for item in told}

    def rank(peer: str) -> tuple[bool, float, str]:
        return peer not in partners, rtts[peer] * (1 - RTTS_SHARE * (peer in before)), peer

    chosen = sorted(sorted(rtts, key=rank)[:MAX_LINKS])
    links = tuple(
        PeerLink(peer, rtts[peer], bandwidths.get(peer, 0.0) or _told_bandwidth(before.get(peer)))
        for peer in chosen
    )
    news = chosen != sorted(before) or any(_news(before[link.peer], link) for link in links)
    return links if news else told


def _told_bandwidth(link: PeerLink | None) -> float:
    return link.bandwidth if link else 0.0


def _news(before: PeerLink, now: PeerLink) -> bool:
    # The daemons themselves take a millisecond or two, which is never twice the same.
    further = moved(before.rtt, now.rtt, RTTS_SHARE) and abs(now.rtt - before.rtt) > RTTS_LEAST_S
    return further or moved(before.bandwidth, now.bandwidth, BANDWIDTH_SHARE)
