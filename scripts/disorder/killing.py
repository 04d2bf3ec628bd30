"""One node dies after the other under load, and is started again."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import trio

from scripts.benchmarks.bench import say
from scripts.benchmarks.errors import BenchError
from scripts.disorder.clients import Clients, learn
from scripts.disorder.cluster import Cluster, Node, Status
from scripts.disorder.ground import Ground
from scripts.disorder.leaks import holding, quiet
from scripts.disorder.pauses import Death, Told
from scripts.disorder.questions import Answer, Question, questions
from scripts.disorder.tally import Story
from scripts.disorder.toll import Toll, toll
from scripts.disorder.victims import WORDS, Kind, Layout, choose

SETTLE_S = 240.0
VICTIM_S = 600.0
"""Limits for a busy machine: what is measured there may be such that there is one pipeline alone at
first, and then the leader looks for a second one after 30, 90 and 210 s."""
CALM_S = (1.0, 3.0)
AWAY_S = 5.0
FROZEN_S = 10.0
RESTART_S = 10.0
TIMEOUTS_S = (5.0, 20.0, 60.0)
"""Of the requests where the death leaves no other pipeline."""


class Killed(msgspec.Struct, frozen=True, kw_only=True):
    """`amiss` is what was left over at the end, and why some were not killed."""

    tolls: list[Toll]
    amiss: list[str]


async def kill_all(
    layout: Layout, kinds: Sequence[Kind], times: int, seed: int, clients: int, ground: Ground
) -> Killed:
    """Raises `BenchError` if there is no cluster, or nobody to be killed."""
    root = ground.spots[0].data_dir.parent
    cluster = Cluster(root, ground.spots, layout.capacities)
    try:
        return await _kill_all(cluster, kinds, times, seed, clients)
    finally:
        cluster.stop()


async def _kill_all(
    cluster: Cluster, kinds: Sequence[Kind], times: int, seed: int, number: int
) -> Killed:
    say(f"==> {len(cluster.nodes)} nodes; logs are in {cluster.root}")
    await cluster.start()
    await _settled(cluster)
    right = await learn(cluster.nodes[0], questions())
    before = {node.name: holding(node) for node in cluster.nodes}
    tolls, amiss = [], []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.watch)
        for kind in kinds:
            killing = Killing(cluster, kind, random.Random(f"pxd kills {seed} {kind}"))
            tolls.append(await killing.run(times, seed, number, right))
            amiss += [killing.amiss] if killing.amiss else []
        nursery.cancel_scope.cancel()
    amiss += await quiet(cluster, before)
    return Killed(tolls=tolls, amiss=[*amiss, *cluster.fallen])


async def _settled(cluster: Cluster) -> None:
    if amiss := await cluster.settle(SETTLE_S):
        raise BenchError(f"the cluster does not come to rest: {amiss}")


@dataclass
class _Act:
    node: Node
    at: float
    over: float = 0.0


class Killing:
    """All deaths of one kind. `amiss` says why there were not as many as wanted."""

    def __init__(self, cluster: Cluster, kind: Kind, rng: random.Random) -> None:
        self.amiss = ""
        self._cluster = cluster
        self._kind = kind
        self._rng = rng
        self._acts: list[_Act] = []
        self._stories: list[Story] = []
        self._offset = time.time() - trio.current_time()

    async def run(self, times: int, seed: int, number: int, right: dict[Question, Answer]) -> Toll:
        if self._kind == "restart":
            right = _in_a_hurry(right)
        began = trio.current_time()
        clients = Clients(self._cluster, right, seed, began, self._stories.append)
        async with trio.open_nursery() as nursery:
            for client in range(number):
                nursery.start_soon(clients.run, client)
            try:
                for _ in range(times):
                    await self._kill()
                await _settled(self._cluster)
            except BenchError as error:
                self.amiss = str(error)
                say(f"    {error}")
            clients.over.set()
        logs = [log for node in self._cluster.nodes for log in node.logs]
        told = Told.of(log.read_text(errors="replace") for log in logs)
        deaths = [self._death(act, told) for act in self._acts]
        return toll(self._kind, deaths, self._stories, told, self._offset)

    async def _kill(self) -> None:
        node = await self._victim()
        say(f"    {WORDS[self._kind]}: {node.name} ({await self._cluster.roles(node)})")
        act = _Act(node, at=time.time())
        self._acts.append(act)
        match self._kind:
            case "executor":
                for process in node.executors()[:1]:
                    process.kill()
                await trio.sleep(AWAY_S)
                act.over = time.time()
                await _settled(self._cluster)
                # So many deaths of one node's executor would be a reason to do without it.
                await node.command("resume", node.name)
            case "freeze":
                node.freeze()
                await trio.sleep(FROZEN_S)
                act.over = time.time()
                node.thaw()
            case "restart":
                node.kill()
                await trio.sleep(RESTART_S)
                await node.start()
                await _settled(self._cluster)
                act.over = time.time()
            case _:
                node.kill()
                await trio.sleep(AWAY_S)
                act.over = time.time()
                await node.start()

    async def _victim(self) -> Node:
        """Once all is well and there is one."""
        with trio.move_on_after(VICTIM_S):
            while True:
                await _settled(self._cluster)
                await trio.sleep(self._rng.uniform(*CALM_S))
                status = await self._cluster.status()
                await self._forgive(status)
                chosen = choose(self._rng, self._kind, status) if status else None
                if chosen is not None:
                    return next(node for node in self._cluster.nodes if node.id == chosen)
        raise BenchError(f"{WORDS[self._kind]}: no plan is such that it leaves a pipeline")

    async def _forgive(self, status: Status | None) -> None:
        """Where all nodes are on one machine, one that is slow only has busy neighbours."""
        for node in status["nodes"] if status else ():
            if node["slow"]:
                await self._cluster.awake[0].command("resume", node["name"])

    def _death(self, act: _Act, told: Told) -> Death:
        """Of a process that ends the system tells at once; that one is silent, others find out."""
        detectable = act.at
        if self._kind == "freeze":
            suspected = told.suspected.get(act.node.id, [])
            detectable = min((t for t in suspected if act.at < t < act.over), default=act.over)
        return Death(node=act.node.name, at=act.at, detectable=detectable, over=act.over)


def _in_a_hurry(right: dict[Question, Answer]) -> dict[Question, Answer]:
    return {
        msgspec.structs.replace(question, timeout=timeout): answer
        for question, answer in right.items()
        for timeout in TIMEOUTS_S
    }
