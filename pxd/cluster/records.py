"""What a node says of itself. A record is owned by its node and only ever replaced whole."""

from typing import Annotated, Literal

import msgspec

from pxd.cluster.plans import Epoch
from pxd.wire import Coding, Count, Identifier, Name, Reason

Measure = Annotated[float, msgspec.Meta(ge=0, le=1e15)]
Address = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]

MAX_LINKS = 16
MAX_MODELS = 16
MAX_CHOSEN = 8
MAX_UNFIT = 8

StageState = Literal["loading", "ready", "restarting", "failed"]


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """Compute hardware. `memory` in bytes, `tflops` bf16/fp16 matrix TFLOP/s, `bandwidth` GB/s.

    `memory_limit` is how much of the memory the system lets the device use, 0 where it sets none.
    """

    kind: Annotated[str, msgspec.Meta(max_length=32)] = "cpu"
    name: Annotated[str, msgspec.Meta(max_length=128)] = ""
    memory: Count = 0
    tflops: Measure = 0.0
    bandwidth: Measure = 0.0
    memory_limit: Count = 0
    executors: Annotated[tuple[Identifier, ...], msgspec.Meta(max_length=8)] = ()


class KvBlocks(msgspec.Struct, frozen=True, array_like=True):
    """The KV blocks of a pipeline as its head counts them: `free` are those that no request holds;
    `cached` of these keep a prefix that can be used again, until they are needed."""

    total: Count
    free: Count
    cached: Count


class StageReport(msgspec.Struct, frozen=True, kw_only=True):
    """State of one stage on its node. `progress` runs from 0 to 1 while loading.

    `kv_tokens` is how many token positions of KV cache the stage can hold once ready,
    `prefix_cache` whether requests can begin with blocks that others have left, and `trims` whether
    positions can be taken back; `tier_slots` is how many blocks its second KV tier keeps. `coding`
    is how it sends hidden states on, None for as they are. While a pipeline retires, stage 0 tells
    in `requests` how many its head holds. Stage 0 also tells in `kv` of its pipeline's KV blocks
    while that takes requests; `kv_held` and `kv_kept` are what the stage itself holds, in blocks,
    of requests that have not ended and of those that have. What follows is measured while the stage
    serves, in seconds, 0 until then: `decode_s` is one decode step of one request and `prefill_s`
    one prompt token within a long chunk, both from the step's arrival at the idle stage to its
    result. Stage 0 alone, being at the head, tells of its whole pipeline: `token_s` per token and
    `ttft_s` to the first token of a prompt of about `ttft_tokens`, both for one request alone, and
    `tokens_per_s` while it works. These figures are from when it works as usual: while it is
    `slow`, its steps take so many times longer; 0 means that it is not.

    `restarts` counts its executor's deaths, of which in `hangs` it gave no answer and was killed;
    `out_of_memory` and `not_finite` the steps that failed so.
    """

    model: Name
    pipeline: Identifier
    start: Count
    end: Count
    state: StageState
    progress: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    kv_tokens: Count = 0
    restarts: Count = 0
    hangs: Count = 0
    out_of_memory: Count = 0
    not_finite: Count = 0
    reason: Reason = ""
    prefix_cache: bool = False
    tier_slots: Count = 0
    trims: bool = False
    coding: Coding | None = None
    requests: Count | None = None
    kv: KvBlocks | None = None
    kv_held: Count = 0
    kv_kept: Count = 0
    decode_s: Measure = 0.0
    prefill_s: Measure = 0.0
    token_s: Measure = 0.0
    ttft_s: Measure = 0.0
    ttft_tokens: Count = 0
    tokens_per_s: Measure = 0.0
    slow: Measure = 0.0


class PeerLink(msgspec.Struct, frozen=True, array_like=True):
    """The way to `peer`: `rtt` in seconds, smoothed, as membership's probes measure it; `bandwidth`
    in GB/s of payload on a data channel. 0 where it is not measured."""

    peer: Identifier
    rtt: Measure
    bandwidth: Measure = 0.0


class HeldModel(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A model of which this node has files, perhaps not all, and lends them to others;
    `fingerprint` tells revisions of one name apart."""

    name: Name
    fingerprint: Annotated[str, msgspec.Meta(max_length=128)] = ""


class Unfit(msgspec.Struct, frozen=True, array_like=True, order=True):
    """A model at which a node keeps failing, so that others have to serve it for now; and why."""

    model: Name
    reason: Annotated[str, msgspec.Meta(max_length=300)]


Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_CHOSEN)]


class ModelChoice(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Which models the cluster is to serve: a last-writer-wins register that every node carries.

    The greatest of all wins everywhere; a new choice takes the greatest stamp plus one. `names` are
    in the order in which they were chosen. `outgoing` are those before, which go on until the
    others serve in their place.
    """

    stamp: Count
    by: Annotated[str, msgspec.Meta(max_length=128)]
    names: Names
    outgoing: Names = ()


class NodeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Ordered by (incarnation, version): of two records of a node the greater replaces the other.

    `incarnation` grows with every start and refutation and is persisted; `version` with every
    change of content. `memory` is what the node offers to models, in bytes. `seniority` is the
    place in join order, 0 until the node has settled; `leads` is the term it leads, 0 for none.
    `running`, `waiting` and `kv_tier` are of the pipelines that begin here: their requests, and how
    short the fullest is of KV blocks, from 0 (plenty) to 3 (almost none).
    `links` are those to the peers that matter most to this node. `relay` says that it passes
    traffic on for members that cannot reach each other. `leaving` says that it goes once others
    serve in its place: it is no candidate for leadership and takes no part in new plans. One that
    is `drained` takes no part in them either, but stays a member and goes on answering clients.
    `unfit` are the models in whose plans it takes no part. `slow` is how many times slower than
    usual it works, 0 for none; it stays for a while after the stage that showed it has gone. `door`
    is a digest of its keys and bans: where two differ, one is behind. `keys` is the generation of
    its cluster key.
    """

    id: Identifier
    name: Annotated[str, msgspec.Meta(max_length=64)]
    incarnation: Count = 0
    version: Count = 0
    pxd: Annotated[str, msgspec.Meta(max_length=32)] = ""
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    device: Device | None = None
    memory: Count = 0
    max_layers: Count | None = None
    priority: Annotated[int, msgspec.Meta(ge=-1000, le=1000)] = 0
    seniority: Count = 0
    term: Count = 0
    leads: Count = 0
    plan: Epoch | None = None
    choice: ModelChoice | None = None
    stages: Annotated[tuple[StageReport, ...], msgspec.Meta(max_length=64)] = ()
    running: Count = 0
    waiting: Count = 0
    kv_tier: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    problem: Reason = ""
    started: Measure = 0.0
    links: Annotated[tuple[PeerLink, ...], msgspec.Meta(max_length=MAX_LINKS)] = ()
    models: Annotated[tuple[HeldModel, ...], msgspec.Meta(max_length=MAX_MODELS)] = ()
    relay: bool = False
    leaving: bool = False
    drained: bool = False
    unfit: Annotated[tuple[Unfit, ...], msgspec.Meta(max_length=MAX_UNFIT)] = ()
    slow: Measure = 0.0
    door: Annotated[str, msgspec.Meta(max_length=64)] = ""
    keys: Count = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.incarnation, self.version
