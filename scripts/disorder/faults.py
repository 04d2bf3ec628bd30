"""What the faults of a schedule are, and how they end."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import msgspec
import psutil
import trio

from scripts.benchmarks.bench import say
from scripts.benchmarks.errors import BenchError
from scripts.disorder.cluster import Cluster, Node
from scripts.disorder.ground import Ground
from scripts.disorder.schedule import Fault, Kind

COMMAND_EVERY_S = 1.0
COMMAND_WITHIN_S = 60.0

WORDS: dict[Kind, str] = {
    "kill": "kill -9",
    "executor": "kill -9 of an executor",
    "freeze": "SIGSTOP",
    "hang": "SIGSTOP of the executors",
    "partition": "cut off",
    "drain": "drain",
    "leave": "SIGTERM",
    "model": "another model is served, too",
    "disk": "full disk",
}


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """A fault as it was carried out, in words. `at`: seconds since the run began."""

    at: float
    fault: Fault
    words: str


class Disorder:
    """Carries out faults. `failures` says which could not be carried out or undone."""

    def __init__(self, cluster: Cluster, ground: Ground, other_model: Path, began: float) -> None:
        self.done: list[Done] = []
        self.failures: list[str] = []
        self._cluster = cluster
        self._ground = ground
        self._other_model = str(other_model)
        self._began = began
        # What befalls a node may take longer than planned; the next thing waits for its turn.
        self._turns = {node.name: trio.Lock() for node in cluster.nodes}
        self._acts: dict[Kind, Callable[[list[Node]], AbstractAsyncContextManager[None]]] = {
            "kill": self._kill,
            "executor": self._executor,
            "freeze": self._freeze,
            "hang": self._hang,
            "partition": self._partition,
            "drain": self._drain,
            "leave": self._leave,
            "model": self._model,
            "disk": self._disk,
        }

    async def run(self, faults: Sequence[Fault]) -> None:
        """Returns when the last one is over."""
        async with trio.open_nursery() as nursery:
            for fault in faults:
                await trio.sleep_until(self._began + fault.at)
                nursery.start_soon(self._commit, fault)

    async def _commit(self, fault: Fault) -> None:
        nodes = [self._cluster.nodes[place] for place in fault.places]
        async with AsyncExitStack() as stack:
            for node in sorted(nodes, key=lambda node: node.name):
                await stack.enter_async_context(self._turns[node.name])
            await self._carry_out(fault, nodes)

    async def _carry_out(self, fault: Fault, nodes: list[Node]) -> None:
        words = await self._words(fault, nodes)
        at = trio.current_time() - self._began
        self.done.append(Done(at=round(at, 1), fault=fault, words=words))
        say(f"{at:7.1f} s  {words}")
        try:
            async with self._acts[fault.kind](nodes):
                await trio.sleep(fault.lasting)
        except BenchError as error:
            self.failures.append(f"{words}, at {at:.1f} s: {error}")
            say(f"           {self.failures[-1]}")

    async def _words(self, fault: Fault, nodes: Sequence[Node]) -> str:
        told = []
        for node in nodes:
            roles = await self._cluster.roles(node)
            told.append(f"{node.name} ({roles})" if roles else node.name)
        words = " ".join([WORDS[fault.kind], *([": " + ", ".join(told)] if told else [])])
        return words.replace(" :", ":") + (f", {fault.lasting:g} s" if fault.lasting else "")

    @asynccontextmanager
    async def _kill(self, nodes: list[Node]) -> AsyncIterator[None]:
        [node] = nodes
        node.kill()
        yield
        await node.start()

    @asynccontextmanager
    async def _leave(self, nodes: list[Node]) -> AsyncIterator[None]:
        [node] = nodes
        await node.leave()
        yield
        await node.start()

    @asynccontextmanager
    async def _executor(self, nodes: list[Node]) -> AsyncIterator[None]:
        for process in nodes[0].executors()[:1]:
            _each([process], psutil.Process.kill)
        yield

    @asynccontextmanager
    async def _freeze(self, nodes: list[Node]) -> AsyncIterator[None]:
        [node] = nodes
        node.freeze()
        yield
        node.thaw()

    @asynccontextmanager
    async def _hang(self, nodes: list[Node]) -> AsyncIterator[None]:
        executors = nodes[0].executors()
        _each(executors, psutil.Process.suspend)
        yield
        _each(executors, psutil.Process.resume)

    @asynccontextmanager
    async def _partition(self, nodes: list[Node]) -> AsyncIterator[None]:
        places = [self._cluster.nodes.index(node) for node in nodes]
        await trio.to_thread.run_sync(self._ground.part, places)
        yield
        await trio.to_thread.run_sync(self._ground.heal)

    @asynccontextmanager
    async def _drain(self, nodes: list[Node]) -> AsyncIterator[None]:
        [node] = nodes
        await self._command("drain", "--no-wait", node.name)
        yield
        await self._command("resume", node.name)

    @asynccontextmanager
    async def _model(self, _: list[Node]) -> AsyncIterator[None]:
        await self._command("models", "use", "--no-wait", self._other_model)
        yield
        await self._command("models", "stop", "--no-wait", self._other_model)

    @asynccontextmanager
    async def _disk(self, nodes: list[Node]) -> AsyncIterator[None]:
        [node] = nodes
        node.spot.fill()
        yield
        node.spot.free()

    async def _command(self, *arguments: str) -> None:
        """Have some node do it. While things change it may be right to be refused at first."""
        why = "no node answers"
        with trio.move_on_after(COMMAND_WITHIN_S):
            while True:
                for node in self._cluster.awake:
                    try:
                        await node.command(*arguments)
                    except BenchError as error:
                        why = f"{node.name} says: {error}"
                    else:
                        return
                await trio.sleep(COMMAND_EVERY_S)
        raise BenchError(f"`pxd {' '.join(arguments)}` fails: {why}")


def _each(processes: Sequence[psutil.Process], act: Callable[[psutil.Process], None]) -> None:
    for process in processes:
        try:
            act(process)
        except psutil.NoSuchProcess:
            # The daemon was faster.
            continue
