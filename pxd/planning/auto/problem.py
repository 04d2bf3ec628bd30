"""A planning problem in arrays: all nodes of one kind share their tables.

Times are rooflines: a layer takes as long as its arithmetic or its memory traffic, whichever is
longer. Where a node has measured itself, its roofline is scaled to what it measured.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import msgspec
import numpy as np
import numpy.typing as npt

from pxd.planning.auto.work import Floats, Work, floats
from pxd.planning.capacity import Budget, StageSizes, budget
from pxd.planning.links import Links
from pxd.planning.model import Measured, ModelCost, NodeOffer
from pxd.planning.result import PlanInputs

Bools = npt.NDArray[np.bool_]
Tables = tuple[Floats, Floats]
"""Seconds per kind: (kind, cut), sums over the layers up to each cut with the head in the last;
and (kind,), what a stage takes beside its layers."""

STAGE_OVERHEAD_S = 0.0005
"""Of every step on every stage: framing, the executor's pipe, launching."""
PREFILL_CHUNK = 2048
MAX_CUTS = 256
"""Of models with more layers only so many cuts are considered."""
FALLBACK_TFLOPS, FALLBACK_BANDWIDTH = 1.0, 50.0


class Kind(msgspec.Struct, frozen=True, order=True):
    """What makes nodes interchangeable, links apart."""

    room: Budget
    tflops: float
    bandwidth: float
    measured: Measured


class Problem:
    """Inputs in canonical order (most memory first, then by id) with everything looked up.

    `nodes` are those that can hold anything of the model at all; a node is its index in it, and
    `kinds[node]` its row in the tables. A place where the model may be cut is its index in `cuts`.
    Raises ValueError for two offers of one node, or a model whose layers do not fit together.
    """

    def __init__(self, inputs: PlanInputs) -> None:
        model, settings = _with_fewer_cuts(inputs.model), inputs.settings
        self.inputs, self.model, self.workload = inputs, model, inputs.workload
        self.sizes = StageSizes(model, settings.min_kv_tokens)
        self.cuts = np.array(self.sizes.cuts)
        by_id = {offer.id: offer for offer in inputs.offers}
        if len(by_id) != len(inputs.offers):
            raise ValueError("two offers of the same node")
        rooms = {node: budget(offer, model, settings) for node, offer in by_id.items()}
        usable = [node for node in rooms if self.sizes.holds_any(rooms[node])]
        usable.sort(key=lambda node: (-rooms[node].weights, -rooms[node].layers, node))
        self.nodes = tuple(usable)
        self.rooms = {node: rooms[node] for node in usable}
        speeds = known_speeds([by_id[node] for node in usable])
        kinds = [
            Kind(rooms[node], *speed, by_id[node].measured or Measured(0, 0))
            for node, speed in zip(usable, speeds, strict=True)
        ]
        self.kind_list = sorted(set(kinds), reverse=True)
        index = {kind: place for place, kind in enumerate(self.kind_list)}
        self.kinds = tuple(index[kind] for kind in kinds)
        self.links = Links(inputs.links)
        self.work = Work(model, *_clipped(inputs))
        self._decode: dict[int, Tables] = {}

    @property
    def last(self) -> int:
        """The index of the last cut, which is the end of the model."""
        return len(self.cuts) - 1

    @cached_property
    def place_of(self) -> dict[str, int]:
        """The index of each node in `nodes`."""
        return {node: place for place, node in enumerate(self.nodes)}

    @cached_property
    def cut_at(self) -> dict[int, int]:
        """The index in `cuts` of each layer before which the model may be cut."""
        return {layer: place for place, layer in enumerate(self.sizes.cuts)}

    @cached_property
    def request_bytes(self) -> Floats:
        """KV bytes of one request up to each cut."""
        return self._upto(self.work.request_bytes())

    @cached_property
    def kv_rooms(self) -> Floats:
        return floats([kind.room.kv for kind in self.kind_list])

    @cached_property
    def fits(self) -> Bools:
        """(kind, from cut, to cut): whether that stage is within the node's memory and limits."""
        upto = self._upto(floats(self.model.layer_bytes))
        weights = upto[None, :] - upto[:, None]
        weights[0, :] += self.model.embedding_bytes
        ends = [self.sizes.weights(a, self.model.layers) for a in self.sizes.cuts[:-1]]
        weights[:-1, -1] = ends
        kv = self._upto(floats(self.model.kv_bytes_per_token)) * self.sizes.min_kv_tokens
        layers = self.cuts[None, :] - self.cuts[:, None]
        return np.array(
            [
                (layers > 0)
                & (layers <= kind.room.layers)
                & (weights <= kind.room.weights)
                & (kv[None, :] - kv[:, None] <= kind.room.kv)
                for kind in self.kind_list
            ]
        )

    def decode(self, batch: int) -> Tables:
        """A decode step of `batch` requests."""
        if batch not in self._decode:
            sums, beside = self._decode_roofline(batch)
            scale = self._decode_scale
            self._decode[batch] = sums * scale[:, None], beside * scale
        return self._decode[batch]

    @cached_property
    def prefill(self) -> Tables:
        """One chunk of the workload's prompt; prefill computes no logits."""
        sums, beside = self._tables(*self.work.prefill(self.chunk), (0.0, 0.0))
        measured = [kind.measured.prefill_s * self.chunk for kind in self.kind_list]
        scale = self._scales((sums, beside), measured)
        return sums * scale[:, None], beside * scale

    @property
    def chunk(self) -> int:
        """Tokens in one prefill chunk of the workload's prompt."""
        return max(1, -(-self.work.prompt // self.chunks))

    @property
    def chunks(self) -> int:
        return max(1, -(-self.work.prompt // PREFILL_CHUNK))

    def hops(self, order: Sequence[int], positions: int = 1) -> list[float]:
        """Seconds on the way on from each stage, for the hidden states of some positions.

        From the last stage it is the token's way home to the first.
        """
        size = positions * self.model.hidden_size * self.model.activation_bytes
        names = [self.nodes[node] for node in order]
        onward = [self.links.transfer(a, b, size) for a, b in pairwise(names)]
        return [*onward, self.links.transfer(names[-1], names[0], 0)]

    @cached_property
    def _decode_scale(self) -> Floats:
        measured = [kind.measured.decode_s for kind in self.kind_list]
        return self._scales(self._decode_roofline(1), measured)

    def _scales(self, roofline: Tables, measured: Sequence[float]) -> Floats:
        """Per kind: measured time over expected time of the same layers.

        Who has not measured itself yet is taken to miss its roofline by as much as the others.
        """
        sums, beside = roofline
        scales: Floats = np.full(len(self.kind_list), np.nan)
        for row, (kind, seconds) in enumerate(zip(self.kind_list, measured, strict=True)):
            ends = np.searchsorted(self.cuts, [kind.measured.start, kind.measured.end])
            if seconds > 0 and ends[0] < ends[1] <= self.last:
                expected = sums[row, ends[1]] - sums[row, ends[0]] + beside[row]
                scales[row] = seconds / expected
        known = scales[np.isfinite(scales)]
        usual = float(np.exp(np.log(known).mean())) if len(known) else 1.0
        return np.where(np.isfinite(scales), scales, usual)

    def _decode_roofline(self, batch: int) -> Tables:
        return self._tables(*self.work.decode(batch), self.work.head(batch))

    def _tables(self, flops: Floats, moved: Floats, head: tuple[float, float]) -> Tables:
        sums = np.empty((len(self.kind_list), len(self.cuts)))
        for row, kind in enumerate(self.kind_list):
            rate = kind.tflops * 1e12 * self.model.compute_scale
            width = kind.bandwidth * 1e9
            sums[row] = self._upto(np.maximum(flops / rate, moved / width))
            sums[row, -1] += max(head[0] / rate, head[1] / width)
        return sums, np.full(len(self.kind_list), STAGE_OVERHEAD_S)

    def _upto(self, per_layer: Floats) -> Floats:
        sums: Floats = np.concatenate([[0.0], np.cumsum(per_layer)])[self.cuts]
        return sums


def known_speeds(offers: Sequence[NodeOffer]) -> list[tuple[float, float]]:
    """(TFLOP/s, GB/s of stored weights) of each offer; what is not known counts as the mean of what
    is."""
    tflops = [offer.tflops for offer in offers]
    bandwidth = [offer.bandwidth / offer.expansion for offer in offers]
    return list(
        zip(_filled(tflops, FALLBACK_TFLOPS), _filled(bandwidth, FALLBACK_BANDWIDTH), strict=True)
    )


def _filled(figures: Sequence[float], fallback: float) -> list[float]:
    known = [figure for figure in figures if figure > 0]
    mean = sum(known) / len(known) if known else fallback
    return [figure if figure > 0 else mean for figure in figures]


def _with_fewer_cuts(model: ModelCost) -> ModelCost:
    stride = -(-len(model.splits) // MAX_CUTS)
    return msgspec.structs.replace(model, splits=model.splits[::stride]) if stride > 1 else model


def _clipped(inputs: PlanInputs) -> tuple[int, int]:
    """(prompt, output) of the workload, shortened to what the model's context holds."""
    prompt, output = inputs.workload.prompt, inputs.workload.output
    context = inputs.model.context or prompt + output
    if prompt + output <= context:
        return prompt, output
    prompt = max(1, context * prompt // (prompt + output))
    return prompt, max(1, context - prompt)
