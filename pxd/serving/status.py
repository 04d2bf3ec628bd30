"""The shape of `pxd status --json`, `/cluster/status` and everything that shows the cluster."""

from typing import Literal

import msgspec

NodeState = Literal["alive", "suspect", "dead", "left"]
Path = Literal["", "direct", "punched", "relayed"]
ModelState = Literal["waiting", "loading", "serving", "failed", "stopping"]


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    """One stage as its node reports it. `progress` 0..1, meaningful while `state` is loading.

    `wire_dtype` is how it sends hidden states to the next stage: "native", "fp8" or "int8".
    `restarts` counts deaths of its executor, of which in `hangs` it gave no answer and was killed;
    `out_of_memory` and `not_finite` count steps that had no memory, or gave NaN or infinity. `slow`
    is how many times longer than usual its steps take, 0 while that is not far. `kv_held` and
    `kv_kept` are blocks of KV that it holds of requests that have not ended, and of others that
    have; some seconds old.
    """

    model: str
    pipeline: str
    start: int
    end: int
    state: str
    progress: float = 0.0
    restarts: int = 0
    reason: str = ""
    wire_dtype: str = "native"
    hangs: int = 0
    out_of_memory: int = 0
    not_finite: int = 0
    slow: float = 0.0
    kv_held: int = 0
    kv_kept: int = 0


class NodeView(msgspec.Struct, frozen=True, kw_only=True):
    """`since` is how many seconds the node has been in `state`. `rtt_ms` and `link_gbs`, the GB/s
    that go from this node to that one, are None if not measured.

    `path` is how this node is connected with it, empty if it is not: "punched" went through the NAT
    of both, "relayed" goes through the node `through` (peer id). `relay`: it passes traffic on.
    `drained`: it takes no part in plans. `leaving`: nor does it, and it goes once others serve in
    its place. `unfit` are the models that it leaves to others because it
    keeps failing at them. `slow` is how many times slower than usual plans take it to be, 0 for as
    usual. `files` are the models of which it has files, perhaps not all.
    """

    id: str
    name: str
    state: NodeState
    device: str
    memory_gib: float
    stages: list[StageView]
    problem: str = ""
    since: float = 0.0
    rtt_ms: float | None = None
    connected: bool = False
    path: Path = ""
    through: str = ""
    relay: bool = False
    version: str = ""
    tflops: float = 0.0
    bandwidth_gbs: float = 0.0
    running: int = 0
    waiting: int = 0
    link_gbs: float | None = None
    drained: bool = False
    leaving: bool = False
    unfit: list[str] = []
    slow: float = 0.0
    files: list[str] = []


class PipelineStageView(msgspec.Struct, frozen=True, kw_only=True):
    """Layers [start, end) on `node` (peer id)."""

    node: str
    start: int
    end: int
    state: str


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a pipeline is: for one request alone with a prompt of `prompt_tokens`.

    `tokens_per_s` is the peak where predicted, and what was seen while it worked where measured.
    `bottleneck` is the node that bounds the peak. None: not known.
    """

    prompt_tokens: int
    ttft_ms: float | None
    token_ms: float
    tokens_per_s: float | None
    bottleneck: str | None = None


class PipelineFigures(msgspec.Struct, frozen=True, kw_only=True):
    predicted: Figures | None = None
    measured: Figures | None = None


class KvView(msgspec.Struct, frozen=True, kw_only=True):
    """The blocks of KV of a pipeline, each of `block_tokens` positions, as its head counts them;
    all 0 while it takes no requests. `free` are those that no request holds; of these, `cached`
    keep a prefix that can be used again, until they are needed."""

    total: int
    free: int
    cached: int
    block_tokens: int


class SpareView(msgspec.Struct, frozen=True, kw_only=True):
    """A node that holds layers [start, end) ready for when another one is lost."""

    node: str
    start: int
    end: int


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """`figures` and `kv` have one entry for each of `pipelines`. Those of `retiring` go on until
    others stand in for them. A model that is stopping takes no new requests."""

    name: str
    state: ModelState
    reason: str
    layers: int
    pipelines: list[list[PipelineStageView]]
    figures: list[PipelineFigures] = []
    kv: list[KvView] = []
    spares: list[SpareView] = []
    retiring: list[list[PipelineStageView]] = []


class AddedView(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a person wants to have on this node. `progress` 0..1; `reason` says where it
    comes from, or why not."""

    name: str
    state: Literal["fetching", "here", "failed"]
    progress: float = 0.0
    reason: str = ""


class ClusterStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster as `self` (peer id) sees it. `leader` is None until one is known.

    `hints` are sentences on why it sees no other node, `added` the models to be had on this one.
    `looking` says which model it is just finding out about, and how far it is with that.
    `waits_for` is what it waits for before it leaves.
    """

    self_id: str = msgspec.field(name="self")
    leader: str | None
    term: int
    epoch: str | None
    nodes: list[NodeView]
    models: list[ModelView]
    http: str = ""
    version: str = ""
    uptime: float = 0.0
    hints: list[str] = []
    added: list[AddedView] = []
    looking: str = ""
    waits_for: str = ""


class Leaving(msgspec.Struct, frozen=True):
    """What a node says that was told to leave: how many seconds it waits for others at most."""

    within: float
