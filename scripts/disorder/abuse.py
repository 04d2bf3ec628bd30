"""One run of a cluster with clients that abuse it: what became of them, of its memory, and of the
others who asked meanwhile."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import psutil
import trio

from scripts.benchmarks.bench import say
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.sse import BrokeOff, Refused
from scripts.disorder.clients import BROKEN, Reading, ask
from scripts.disorder.cluster import Cluster, Node
from scripts.disorder.ground import Ground
from scripts.disorder.leaks import holding, quiet
from scripts.disorder.questions import LONG, Question
from scripts.disorder.rude import Leavers, Moment, Sippers
from scripts.disorder.tally import quantile

LAYERS_EACH = 3
TIMEOUT_S = 600.0
"""Of requests that are to be answered, however busy the machine is with other things."""

SETTLE_S = 90.0
WATCH_EVERY_S = 0.5
CROWD_TOKENS = 100
LONE_TOKENS = 20
LONE_REQUESTS = 5
SETTLING_S = 3.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is how long each kind of client goes on. `memory` in GiB that each node offers, 0
    for all it has."""

    seed: int
    seconds: float
    leavers: int
    sippers: int
    crowd: int
    tokens: int
    memory: float


class Memory(msgspec.Struct, kw_only=True):
    """MiB that a daemon, and its executor, had resident: at first, and at most."""

    daemon: float
    executor: float
    daemon_most: float = 0.0
    executor_most: float = 0.0


class Lone(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that single requests took, one after the other: alone, and while a crowd asked."""

    where: str
    alone: list[float]
    crowded: list[float]


class Abuse(msgspec.Struct, frozen=True, kw_only=True):
    """`crowd` counts what each of those who came at once got; `wrong` are those endings that
    nobody should get. `memory` by node, and `blocks` of KV by pipeline."""

    left: dict[Moment, int]
    sippers: int
    dropped: int
    crowd: dict[str, int]
    wrong: list[str]
    lone: list[Lone]
    waited: float
    memory: dict[str, Memory]
    blocks: list[int]
    leaks: list[str]

    @property
    def passed(self) -> bool:
        return not self.wrong and not self.leaks


class Watch:
    """Looks at the memory of all nodes, again and again."""

    def __init__(self, cluster: Cluster) -> None:
        self._nodes = cluster.nodes
        self.seen = {node.name: Memory(daemon=d, executor=e) for node, d, e in self._now()}

    def _now(self) -> list[tuple[Node, float, float]]:
        found = []
        for node in self._nodes:
            daemon, *executors = [_resident(process) for process in node.program.family()]
            found.append((node, daemon, sum(executors)))
        return found

    async def run(self) -> None:
        while True:
            for node, daemon, executor in self._now():
                seen = self.seen[node.name]
                seen.daemon_most = max(seen.daemon_most, daemon)
                seen.executor_most = max(seen.executor_most, executor)
            await trio.sleep(WATCH_EVERY_S)

    def told(self) -> str:
        return ", ".join(
            f"{node.name} {daemon:.0f} + {executor:.0f} MiB"
            for node, daemon, executor in self._now()
        )


def _resident(process: psutil.Process) -> float:
    return float(process.memory_info().rss) / 2**20


class Crowd:
    """Many requests at the same time, of which each has to get its answer or be told to wait."""

    def __init__(self) -> None:
        self.endings: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.took: list[float] = []

    async def ask(self, node: Node, question: Question) -> None:
        reading, began = Reading(), trio.current_time()
        try:
            complete = await ask(node, question, reading)
        except Refused as error:
            self._end(f"HTTP {error.status}", error.status == 429 and error.retry_after.isdecimal())
        except BrokeOff as error:
            self._end(f"in the stream, {msgspec.json.decode(error.body)['code']}", False)
        except BROKEN as error:
            self._end(repr(error), False)
        else:
            right = complete and reading.tokens == question.tokens
            self._end("answered" if right else f"{reading.answer()}", right)
            self.took.append(trio.current_time() - began)

    def _end(self, ending: str, proper: bool) -> None:
        self.endings[ending] += 1
        if not proper:
            self.wrong.append(ending)


async def run(wanted: Wanted, ground: Ground, root: Path) -> Abuse:
    """Raises `BenchError` if there is no cluster to begin with."""
    memory = ("--memory", f"{wanted.memory:g}") if wanted.memory else ()
    cluster = Cluster(root, ground.spots, [LAYERS_EACH] * len(ground.spots), memory)
    try:
        await cluster.start()
        if amiss := await cluster.settle(SETTLE_S):
            raise BenchError(f"the cluster does not form: {amiss}")
        return await _abuse(wanted, cluster)
    finally:
        cluster.stop()


async def _abuse(wanted: Wanted, cluster: Cluster) -> Abuse:
    nodes = cluster.nodes
    # Whatever is made once, for the first request, is no leak.
    for node in nodes:
        await Crowd().ask(node, _question(0, CROWD_TOKENS, ""))
    before = {node.name: holding(node) for node in nodes}
    watch = Watch(cluster)
    places = [node.spot.http for node in nodes]
    leavers = Leavers(places, wanted.tokens, wanted.seed)
    sippers = Sippers(places, wanted.tokens)
    crowd, lone = Crowd(), list[Lone]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        say(f"==> {wanted.leavers} clients that leave; {watch.told()}")
        await _for(wanted.seconds, wanted.leavers, leavers.run, leavers.over)
        say(f"==> {wanted.sippers} clients that take a byte a second; {watch.told()}")
        await _for(wanted.seconds, wanted.sippers, sippers.run, sippers.over)
        say(f"==> {wanted.crowd} clients at once; {watch.told()}")
        async with trio.open_nursery() as asking:
            for number in range(wanted.crowd):
                question = _question(number, CROWD_TOKENS, f"user {number}")
                asking.start_soon(crowd.ask, nodes[number % len(nodes)], question)
        say(f"==> {wanted.crowd} requests of one client, and a single one; {watch.told()}")
        flood = await _fairness(wanted, nodes, lone)
        say(f"==> quiet; {watch.told()}")
        nursery.cancel_scope.cancel()
    left = await quiet(cluster, before)
    say(f"    {watch.told()}")
    return Abuse(
        left=dict(leavers.left),
        sippers=wanted.sippers,
        dropped=sippers.dropped,
        crowd=dict(crowd.endings),
        wrong=crowd.wrong + flood.wrong,
        lone=lone,
        waited=round(quantile(flood.took, 0.5), 2),
        memory=watch.seen,
        blocks=[kv["total"] for kv in (await nodes[0].status() or {})["models"][0]["kv"]],
        leaks=left + cluster.fallen,
    )


async def _for(seconds: float, count: int, run: Callable[[int], object], over: trio.Event) -> None:
    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(run, number)  # type: ignore[arg-type]
        await trio.sleep(seconds)
        over.set()


def _question(number: int, tokens: int, user: str) -> Question:
    return Question(
        text=LONG[number % len(LONG)], tokens=tokens, seed=number, user=user, timeout=TIMEOUT_S
    )


async def _fairness(wanted: Wanted, nodes: Sequence[Node], lone: list[Lone]) -> Crowd:
    """A flood of one client at the first node, and another client's requests there and at the
    second one."""
    flood, over = Crowd(), trio.Event()

    async def again(number: int) -> None:
        while not over.is_set():
            await flood.ask(nodes[0], _question(number, CROWD_TOKENS, "flood"))

    alone = [await _single(node) for node in nodes[:2]]
    async with trio.open_nursery() as nursery:
        for number in range(wanted.crowd):
            nursery.start_soon(again, number)
        await trio.sleep(SETTLING_S)
        for node, took, where in zip(nodes, alone, ("the same node", "another node"), strict=False):
            lone.append(Lone(where=where, alone=took, crowded=await _single(node)))
        over.set()
    return flood


async def _single(node: Node) -> list[float]:
    single = Crowd()
    for number in range(LONE_REQUESTS):
        await single.ask(node, _question(number, LONE_TOKENS, "single"))
    if single.wrong:
        raise BenchError(f"a single request was not answered: {single.wrong[0]}")
    return [round(seconds, 3) for seconds in single.took]


def lines(result: Abuse) -> list[str]:
    found = [
        "  left       " + ", ".join(f"{n} {moment}" for moment, n in sorted(result.left.items())),
        f"  sipped     {result.sippers}, of which {result.dropped} were dropped",
        "  crowd      " + ", ".join(f"{n} {ending}" for ending, n in result.crowd.items()),
    ]
    for lone in result.lone:
        alone, crowded = (quantile(times, 0.5) for times in (lone.alone, lone.crowded))
        found.append(
            f"  single     {lone.where}: median {alone:.2f} s alone, {crowded:.2f} s amid a crowd "
            f"that waits {result.waited:.2f} s, longest {max(lone.crowded):.2f} s"
        )
    found += [
        f"  memory     {name}: daemon {memory.daemon:.0f} MiB, at most {memory.daemon_most:.0f}; "
        f"executor {memory.executor:.0f} MiB, at most {memory.executor_most:.0f}"
        for name, memory in result.memory.items()
    ]
    found.append(f"  KV blocks  {', '.join(map(str, result.blocks))}")
    found += [f"  leaks      {len(result.leaks)}", *(f"  leak: {leak}" for leak in result.leaks)]
    return found + [f"  wrong: {n} {ending}" for ending, n in Counter(result.wrong).items()]
