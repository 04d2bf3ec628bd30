"""A daemon without a cluster: real answers to the API's questions, from a script."""

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress

import trio

from pxd.api.app import create_app
from pxd.api.server import serve
from pxd.cluster.bans import Ban
from pxd.cluster.records import ModelChoice
from pxd.doctor.findings import Finding, Report, note, ok
from pxd.serving.added import Removed
from pxd.serving.choice import ChoiceError, Chosen, stop, use
from pxd.serving.clients import Clients
from pxd.serving.door import MAX_GRACE_S, DoorError
from pxd.serving.doorview import Kick, NodeRef, Rotation, Told
from pxd.serving.drain import Drained, DrainError
from pxd.serving.requests import Delta, Generation, Message, UnknownModel
from pxd.serving.status import (
    AddedView,
    ClusterStatus,
    ModelView,
    NodeView,
    PipelineStageView,
    StageView,
)
from pxd.serving.view import Planning

DEADLINE_S = 20.0
TICKET = "pxd1-a-ticket-for-tests"
TOKEN = "a-control-token-for-tests"

PEERS = {name: f"12D3KooW{name.capitalize() * 8}" for name in ("anna", "ben", "carl", "dora")}

Step = Delta | Exception | trio.Event
"""A piece of a scripted answer: something to say, to raise, or to wait for."""


class FakeAnswer:
    """Runs through its script; tells how it was left."""

    def __init__(self, number: int, model: str, prompt_tokens: int, script: list[Step]) -> None:
        self.id = f"fake{number}"
        self.model = model
        self.prompt_tokens = prompt_tokens
        self.recoveries = 0
        self.waiting = threading.Event()
        self.finished = False
        self.left = threading.Event()
        self._script = script

    async def __aenter__(self) -> "FakeAnswer":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.left.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        for step in self._script:
            if isinstance(step, trio.Event):
                self.waiting.set()
                await step.wait()
            elif isinstance(step, Exception):
                raise step
            else:
                yield step
        self.finished = True

    @property
    def cancelled(self) -> bool:
        """Left before its end; waits until it was left at all."""
        assert self.left.wait(DEADLINE_S), "the answer was never left"
        return not self.finished


def echo(messages: tuple[Message, ...]) -> list[Step]:
    """The last message's words, one token each, with a pause for thought before the first."""
    words = messages[-1].content.split(" ")
    pieces = [words[0], *(f" {word}" for word in words[1:])]
    return [Delta("", 1), *(Delta(piece, 1) for piece in pieces), Delta("", 0, "stop")]


class FakeIngress:
    """Serves the model `demo`: the next script of `scripts`, or else an echo."""

    def __init__(self) -> None:
        self.calls: list[tuple[str | None, tuple[Message, ...], Generation]] = []
        self.clients: list[str] = []
        self.sessions: list[str] = []
        self.answers: list[FakeAnswer] = []
        self.scripts: deque[list[Step]] = deque()
        self.refusals: deque[Exception] = deque()

    async def chat(
        self,
        model: str | None,
        messages: tuple[Message, ...],
        generation: Generation,
        client: str = "",
        session: str = "",
    ) -> FakeAnswer:
        await trio.lowlevel.checkpoint()
        self.calls.append((model, messages, generation))
        self.clients.append(client)
        self.sessions.append(session)
        if model not in (None, "demo"):
            raise UnknownModel(f"The model {model!r} is not served by this cluster")
        if self.refusals:
            raise self.refusals.popleft()
        script = self.scripts.popleft() if self.scripts else echo(messages)
        words = sum(len(message.content.split()) for message in messages)
        answer = FakeAnswer(len(self.answers), "demo", words, script)
        self.answers.append(answer)
        return answer


def stage(start: int, end: int, state: str = "ready", **more: object) -> StageView:
    return StageView(model="demo", pipeline="p1", start=start, end=end, state=state, **more)  # type: ignore[arg-type]


def node(name: str, *stages: StageView, **more: object) -> NodeView:
    fields = {
        "state": "alive",
        "device": "cpu: AMD EPYC 9554 64-Core Processor",
        "memory_gib": 15.5,
        "connected": True,
        "rtt_ms": 0.42,
        "version": "0.1.0",
        "tflops": 1.23,
        "bandwidth_gbs": 23.4,
        "since": 75.0,
    }
    return NodeView(id=PEERS[name], name=name, stages=list(stages), **(fields | more))  # type: ignore[arg-type]


def pipeline(*stages: tuple[str, int, int], state: str = "ready") -> list[PipelineStageView]:
    return [
        PipelineStageView(node=PEERS[name], start=start, end=end, state=state)
        for name, start, end in stages
    ]


def serving_status() -> ClusterStatus:
    """Three nodes that serve the demo model together, seen by anna."""
    return ClusterStatus(
        self_id=PEERS["anna"],
        leader=PEERS["ben"],
        term=4,
        epoch="4.2@enBenB",
        nodes=[
            node("anna", stage(0, 3), rtt_ms=None),
            node("ben", stage(3, 6)),
            node("carl", stage(6, 8)),
        ],
        models=[
            ModelView(
                name="demo",
                state="serving",
                reason="",
                layers=8,
                pipelines=[pipeline(("anna", 0, 3), ("ben", 3, 6), ("carl", 6, 8))],
            )
        ],
        http="http://127.0.0.1:8470",
        version="0.1.0",
        uptime=192.5,
    )


def report(*more: Finding) -> Report:
    """A node in good order, but for `more`."""
    found = (
        ok("daemon", "the daemon is up for 3 min at http://127.0.0.1:8470, pxd 0.1.0"),
        note("links", "ben over 5 ms away", "a cable helps most", ("ben: 7.10 ms",)),
        *more,
    )
    healthy = all(finding.level != "problem" for finding in found)
    return Report(
        node="anna", version="0.1.0", daemon=True, healthy=healthy, seconds=1.25, findings=found
    )


class FakeDoor:
    """Remembers what it was asked to do; knows ben, and refuses what the real one would."""

    def __init__(self) -> None:
        self.grace: float | None = None
        self.bans: list[Ban] = []
        self.told = Told(
            confirmed=[NodeRef(id=PEERS["ben"], name="ben")],
            unconfirmed=[NodeRef(id=PEERS["carl"], name="carl")],
        )

    async def rotate(self, grace: float) -> Rotation:
        if grace > MAX_GRACE_S:
            raise DoorError("bad_grace", "a grace period is between 0 and 30 days")
        self.grace = grace
        return Rotation(generation=1, grace=grace, told=self.told)

    async def kick(self, wanted: str, *, rotate: bool = False) -> Kick:
        if wanted == "anna":
            raise DoorError("own_node", "a node cannot kick itself; `pxd stop` makes it leave")
        node = resolve_fake(wanted)
        self.bans.append(Ban(node.id, 1, True, PEERS["anna"], node.name))
        rotation = await self.rotate(0.0) if rotate else None
        return Kick(node=node, banned=True, told=self.told, rotation=rotation)

    async def pardon(self, wanted: str) -> Kick:
        node = resolve_fake(wanted)
        self.bans.clear()
        return Kick(node=node, banned=False, told=self.told)

    def banned(self) -> list[Ban]:
        return self.bans


class FakeDrains:
    """Knows ben, who does not answer while `unreachable` is set."""

    def __init__(self) -> None:
        self.drained = False
        self.unreachable = False

    async def set(self, wanted: str, *, drained: bool) -> Drained:
        await trio.lowlevel.checkpoint()
        if wanted != "ben":
            raise DrainError("unknown_node", f"there is no such node: {wanted!r}")
        if self.unreachable:
            raise DrainError("unreachable", "ben (dead) was asked and did not do it: no answer")
        before, self.drained = self.drained, drained
        node = NodeRef(id=PEERS["ben"], name="ben")
        return Drained(node=node, drained=drained, changed=before != drained)


class FakeChoices:
    """Serves what it is told, but for `nonsense`."""

    def __init__(self) -> None:
        self.choice = ModelChoice(1, "a", ("demo",))

    async def use(self, name: str, *, only: bool = False) -> Chosen:
        await trio.lowlevel.checkpoint()
        if name == "nonsense":
            raise ChoiceError("bad_model", "nonsense cannot be served: no such model")
        return self._chosen(name, use(self.choice, "a", name, only=only))

    async def stop(self, name: str) -> Chosen:
        await trio.lowlevel.checkpoint()
        return self._chosen(name, stop(self.choice, "a", name))

    def _chosen(self, name: str, choice: ModelChoice) -> Chosen:
        changed, self.choice = choice != self.choice, choice
        return Chosen(name, list(choice.names), list(choice.outgoing), changed)


class FakeAdded:
    """Has everything at once, but for `nonsense` and `needed`."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def add(self, name: str, bits: int | None = None) -> AddedView:
        await trio.lowlevel.checkpoint()
        if name == "nonsense":
            raise ChoiceError("bad_model", "nonsense cannot be had: no such model")
        name += f"-{bits}bit" if bits else ""
        self.names.append(name)
        return AddedView(name=name, state="fetching")

    async def remove(self, name: str) -> Removed:
        await trio.lowlevel.checkpoint()
        if name == "needed":
            raise ChoiceError("in_use", "this node serves layers of needed")
        return Removed(name, True, "/hub/cache")


def resolve_fake(wanted: str) -> NodeRef:
    if wanted != "ben":
        raise DoorError("unknown_node", f"there is no such node: {wanted!r}")
    return NodeRef(id=PEERS["ben"], name="ben")


class FakeDaemon:
    def __init__(self) -> None:
        self.door = FakeDoor()
        self.drains = FakeDrains()
        self.choices = FakeChoices()
        self.added = FakeAdded()
        self.control_token = TOKEN
        self.ingress = FakeIngress()
        self.cluster = serving_status()
        self.examined = report()
        self.plans: Planning | None = None
        self.stopped = threading.Event()
        self.ends_when_stopped = True
        self.at_once = False
        self.clients = Clients()
        self.shutdown = trio.Event()

    def status(self) -> ClusterStatus:
        return self.cluster

    async def doctor(self) -> Report:
        await trio.lowlevel.checkpoint()
        return self.examined

    def planning(self) -> Planning | None:
        return self.plans

    def ticket(self) -> str:
        return TICKET

    def stop(self, *, now: bool = False) -> float:
        self.at_once = now
        self.stopped.set()
        if self.ends_when_stopped:
            self.shutdown.set()
        return 0.0 if now else 20.0


class LiveServer:
    """The API over a real socket, in a thread of its own; see `live_server`."""

    def __init__(self, daemon: FakeDaemon, grace: float) -> None:
        self.daemon = daemon
        self.url = ""
        self.host = ""
        self.port = 0
        self._grace = grace
        self._token: trio.lowlevel.TrioToken | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=[self._main], daemon=True)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            app = create_app(self.daemon)
            self.url = await nursery.start(self._serve, app)
            self.host, _, port = self.url.removeprefix("http://").rpartition(":")
            self.port = int(port)
            self._up.set()

    async def _serve(self, app, *, task_status) -> None:
        await serve(
            app,
            "127.0.0.1",
            0,
            shutdown=self.daemon.shutdown,
            grace=self._grace,
            task_status=task_status,
        )

    def set(self, event: trio.Event) -> None:
        self.call(event.set)

    def call(self, function: Callable[[], None]) -> None:
        """In the server's thread, soon."""
        assert self._token is not None
        self._token.run_sync_soon(function)

    def join(self) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), "the server did not end"

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        assert self._up.wait(DEADLINE_S), "the server did not start"
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(trio.RunFinishedError):
            self.set(self.daemon.shutdown)
        self.join()


@contextmanager
def live_server(daemon: FakeDaemon | None = None, grace: float = 0.0) -> Iterator[LiveServer]:
    with LiveServer(daemon or FakeDaemon(), grace) as server:
        yield server
