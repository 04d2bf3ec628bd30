"""What `pxd status` says of a cluster, before it is drawn for a terminal or written for a pipe."""

from collections import Counter
from itertools import islice, zip_longest

import msgspec

from pxd.cli.words import clean, device, duration, layers, memory, speed
from pxd.cluster.plans import SPARE_PREFIX
from pxd.serving.status import (
    ClusterStatus,
    KvView,
    ModelView,
    NodeView,
    PipelineFigures,
    PipelineStageView,
    StageView,
)


class Stage(msgspec.Struct, frozen=True):
    """A range of `total` layers on one node; `words` says its state, with progress if it has any.

    `progress` runs from 0 to 1 and is 1 unless the stage is loading.
    """

    model: str
    start: int
    end: int
    total: int
    state: str
    words: str
    progress: float = 1.0

    @property
    def layers(self) -> str:
        return layers(self.start, self.end)


class Node(msgspec.Struct, frozen=True):
    """`roles` is empty or says "leader", "this node", "drained", "leaving". `words` is the state,
    with age if bad."""

    name: str
    roles: str
    state: str
    words: str
    device: str
    memory: str
    stages: list[Stage]
    load: str
    rtt: str
    speed: str


class Link(msgspec.Struct, frozen=True):
    """One stage of a pipeline: which node, which layers; `words` is empty if it is ready."""

    node: str
    layers: str
    state: str
    words: str


class Model(msgspec.Struct, frozen=True):
    """`figures` says for each of `pipelines` how fast it is; empty where that is not known.
    `retiring` go on until others stand in for them."""

    name: str
    state: str
    layers: int
    reason: str
    pipelines: list[list[Link]]
    figures: list[str]
    spares: str
    retiring: list[list[Link]] = []


class Overview(msgspec.Struct, frozen=True):
    """Everything is words without control characters."""

    name: str
    http: str
    uptime: str
    leader: str
    term: int
    epoch: str
    alive: int
    nodes: list[Node]
    models: list[Model]
    problems: list[tuple[str, str]]


def _load(node: NodeView) -> str:
    if node.state in ("dead", "left"):
        return ""
    waiting = f", {node.waiting} waiting" if node.waiting else ""
    return f"{node.running} running{waiting}" if node.running or waiting else "idle"


class _Reader:
    def __init__(self, status: ClusterStatus) -> None:
        self._status = status
        self._twice = {
            name for name, count in Counter(n.name for n in status.nodes).items() if count > 1
        }
        self._names = {node.id: self._name(node) for node in status.nodes}
        self._totals = {model.name: model.layers for model in status.models}

    def _name(self, node: NodeView) -> str:
        name = clean(node.name)
        return f"{name}~{clean(node.id[-5:])}" if node.name in self._twice else name

    def name(self, peer: str | None) -> str:
        if peer is None:
            return "none yet"
        return self._names.get(peer, f"~{clean(peer[-5:])}")

    def stage(self, stage: StageView) -> Stage:
        loading = stage.state == "loading"
        state = clean(stage.state)
        spare = "spare, " if stage.pipeline.startswith(SPARE_PREFIX) else ""
        return Stage(
            model=clean(stage.model),
            start=stage.start,
            end=stage.end,
            total=max(self._totals.get(stage.model, 0), stage.end),
            state=state,
            words=_loading(stage) if loading else f"{spare}{state}",
            progress=stage.progress if loading else 1.0,
        )

    def node(self, node: NodeView) -> Node:
        roles = [
            word
            for word, peer in (
                ("leader", self._status.leader),
                ("this node", self._status.self_id),
            )
            if peer == node.id
        ]
        roles += ["drained"] if node.drained else []
        roles += ["leaving"] if node.leaving else []
        bad = node.state != "alive"
        return Node(
            name=self.name(node.id),
            roles=", ".join(roles),
            state=node.state,
            words=f"{node.state} {duration(node.since)}" if bad else node.state,
            device=device(node.device),
            memory=memory(node.memory_gib),
            stages=[self.stage(stage) for stage in node.stages],
            load=_load(node),
            rtt="" if node.rtt_ms is None else f"{node.rtt_ms:.1f} ms",
            speed=f"{node.tflops:.1f} TFLOP/s, {node.bandwidth_gbs:.0f} GB/s"
            if node.tflops
            else "",
        )

    def link(self, model: ModelView, stage: PipelineStageView) -> Link:
        words = "" if stage.state == "ready" else clean(stage.state)
        for node in self._status.nodes:
            for own in node.stages:
                if (node.id, own.model) == (stage.node, model.name) and (own.start, own.end) == (
                    stage.start,
                    stage.end,
                ):
                    words = "" if stage.state == "ready" else self.stage(own).words
        return Link(self.name(stage.node), layers(stage.start, stage.end), stage.state, words)

    def model(self, model: ModelView) -> Model:
        return Model(
            name=clean(model.name),
            state=model.state,
            layers=model.layers,
            reason=clean(model.reason),
            pipelines=[[self.link(model, stage) for stage in chain] for chain in model.pipelines],
            figures=[
                " · ".join(filter(None, (self.figures(figures), _blocks(kv))))
                for _, figures, kv in islice(
                    zip_longest(model.pipelines, model.figures, model.kv), len(model.pipelines)
                )
            ],
            spares=", ".join(
                f"{self.name(spare.node)} {layers(spare.start, spare.end)}"
                for spare in model.spares
            ),
            retiring=[[self.link(model, stage) for stage in chain] for chain in model.retiring],
        )

    def figures(self, figures: PipelineFigures | None) -> str:
        if figures is None:
            return ""
        known = (("predicted", figures.predicted), ("measured", figures.measured))
        words = [f"{label} {speed(given)}" for label, given in known if given is not None]
        if figures.predicted is not None and figures.predicted.bottleneck is not None:
            words.append(f"slowest stage {self.name(figures.predicted.bottleneck)}")
        return " · ".join(words)

    def problems(self) -> list[tuple[str, str]]:
        """(node, what is wrong with it)"""
        own = self.name(self._status.self_id)
        found = [(own, clean(hint)) for hint in self._status.hints]
        if self._status.waits_for:
            found.append((own, f"is about to leave and waits for {clean(self._status.waits_for)}"))
        for node in self._status.nodes:
            name = self.name(node.id)
            if node.state == "suspect":
                found.append((name, f"has not answered for {duration(node.since)}"))
            elif node.state == "alive" and not node.connected:
                found.append((name, "is known to be alive, but this node has no connection to it"))
            elif node.path == "relayed":
                way = f"is reached through {self.name(node.through)} only, which is slower"
                found.append((name, way))
            if node.problem:
                found.append((name, clean(node.problem)))
            found += [(name, words) for stage in node.stages for words in _troubles(stage)]
        return found


def _loading(stage: StageView) -> str:
    """How far a stage is; its reason says what it is at, such as fetching from other nodes."""
    what = f" ({clean(stage.reason)})" if stage.reason else ""
    return f"{clean(stage.state)} {stage.progress:.0%}{what}"


def _blocks(kv: KvView | None) -> str:
    return f"{kv.total - kv.free:,} of {kv.total:,} KV blocks held" if kv and kv.total else ""


def _troubles(stage: StageView) -> list[str]:
    where = f"{clean(stage.model)} {layers(stage.start, stage.end)}"
    found = []
    if stage.slow:
        words = f"takes {stage.slow:g} times longer than usual; is it hot, or busy with other work?"
        found.append(f"{where} {words}")
    if stage.out_of_memory:
        words = "had no memory for a step, which was tried again in smaller ones"
        remedy = "`pxd start --memory GIB` with less leaves more room"
        found.append(f"{where} {_times(stage.out_of_memory)} {words}: {remedy}")
    if stage.not_finite:
        found.append(f"{where} {_times(stage.not_finite)} computed NaN or infinity")
    if stage.restarts:
        hung = f" ({_times(stage.hangs)} because it gave no answer)" if stage.hangs else ""
        where += f", restarted {_times(stage.restarts)}{hung},"
    if stage.reason and stage.state != "loading":
        found.append(f"{where} {clean(stage.state)}: {clean(stage.reason)}")
    elif stage.restarts:
        found.append(f"{where} {clean(stage.state)} again")
    return found


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def files(status: ClusterStatus) -> list[tuple[str, str]]:
    """(model, the nodes that have files of it)"""
    reader = _Reader(status)
    names = sorted({name for node in status.nodes for name in node.files})
    return [
        (clean(name), ", ".join(reader.name(n.id) for n in status.nodes if name in n.files))
        for name in names
    ]


_ORDER = {"alive": 0, "suspect": 1, "dead": 2, "left": 3}


def overview(status: ClusterStatus) -> Overview:
    reader = _Reader(status)
    nodes = sorted(status.nodes, key=lambda node: (_ORDER[node.state], node.name, node.id))
    return Overview(
        name=reader.name(status.self_id),
        http=clean(status.http),
        uptime=duration(status.uptime),
        leader=reader.name(status.leader),
        term=status.term,
        epoch=clean(status.epoch or "none yet"),
        alive=sum(node.state == "alive" for node in status.nodes),
        nodes=[reader.node(node) for node in nodes],
        models=[reader.model(model) for model in status.models],
        problems=reader.problems(),
    )
