"""Clients that stream one answer after the other and know what each must be."""

import random
from collections.abc import Callable, Collection, Mapping, Sequence

import h11
import msgspec
import trio

from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.sse import BrokeOff, ChatStream, Chunk, Refused
from scripts.disorder.cluster import Cluster, Node
from scripts.disorder.questions import TIMEOUT_S, Answer, Question
from scripts.disorder.tally import GAP_S, Ending, Outcome, Story, Tally, Waits

PATIENCE_S = TIMEOUT_S + 40.0
"""Beyond the request's own time, what a frozen node may need to say that it is over."""

THINK_S = (0.0, 0.2)
AFTER_ERROR_S = 1.0
NOBODY_S = 0.5
PROPER = {
    429: "overloaded",
    502: "generation_failed",
    503: "not_ready",
    504: "deadline_exceeded",
}
"""The errors that a client may get of a cluster in trouble. None is its own fault."""

BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError)


class _Error(msgspec.Struct):
    message: str
    code: str | None = None


class _Envelope(msgspec.Struct):
    error: _Error


class Reading:
    """One answer as it comes."""

    def __init__(self) -> None:
        self.id = ""
        self.text = ""
        self.tokens = 0
        self.finish = ""
        self.waits = Waits()
        self.gaps: list[tuple[float, float]] = []
        self._last = trio.current_time()

    def add(self, chunk: Chunk) -> None:
        self.id = self.id or chunk.id
        if chunk.usage:
            self.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            self.finish = choice.finish_reason or self.finish
            if choice.delta.content:
                self._piece(choice.delta.content)

    def _piece(self, text: str) -> None:
        now = trio.current_time()
        if self.text:
            self.waits.pause(now - self._last, now)
        else:
            self.waits.first = now - self._last
        self.text += text
        self.note_gap()

    def note_gap(self) -> None:
        """What the client has waited for came, or will not come any more."""
        now = trio.current_time()
        if now - self._last > GAP_S:
            self.gaps.append((self._last, now))
        self._last = now

    def answer(self) -> Answer:
        return Answer(text=self.text, tokens=self.tokens, finish=self.finish)


async def ask(node: Node, question: Question, reading: Reading) -> bool:
    """Stream an answer into `reading`; returns whether it was said to be complete.

    Raises `Refused`, `BrokeOff` and any of `BROKEN`.
    """
    host, _, port = node.spot.http.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as connection:
        chat = ChatStream(connection, node.spot.http)
        await chat.run(question.body(), reading.add)
    return chat.done


async def learn(node: Node, questions: Sequence[Question]) -> dict[Question, Answer]:
    """The right answers, one after the other from an undisturbed node."""
    right = {}
    for question in questions:
        reading = Reading()
        if not await ask(node, question, reading) or not reading.text:
            raise BenchError(f"{node.name} did not answer {question.text!r}")
        right[question] = reading.answer()
    return right


class Clients:
    """All clients together. Each has a node that it likes best, and asks another if it is gone."""

    def __init__(
        self,
        cluster: Cluster,
        right: Mapping[Question, Answer],
        seed: int,
        began: float,
        keep: Callable[[Story], None] = lambda _: None,
    ) -> None:
        """`keep` is given each request that some node took."""
        self.tally = Tally()
        self.over = trio.Event()
        self._cluster = cluster
        self._right = right
        self._seed = seed
        self._began = began
        self._keep = keep

    async def run(self, number: int) -> None:
        """Ask until it is `over`, and hear the last answer out."""
        rng = random.Random(f"pxd chaos client {self._seed} {number}")
        nodes = self._cluster.nodes
        places = [(number + step) % len(nodes) for step in range(len(nodes))]
        while not self.over.is_set():
            question = rng.choice(list(self._right))
            pause = await self._ask_any([nodes[place] for place in places], number, question)
            with trio.move_on_after(pause or rng.uniform(*THINK_S)):
                await self.over.wait()

    async def _ask_any(self, nodes: Sequence[Node], number: int, question: Question) -> float:
        """Ask the first node that takes the connection; returns how long to wait afterwards."""
        for place, node in enumerate(nodes):
            request = _Request(node, question, self._right[question])
            await request.run()
            if request.outcome is None:
                continue
            self.tally.sent += 1
            self.tally.elsewhere += place > 0
            ending = Ending(
                at=round(trio.current_time() - self._began, 1),
                client=number,
                node=node.name,
                question=f"{question.text} seed {question.seed}",
                outcome=request.outcome,
                why=request.why,
            )
            self.tally.add(ending, request.reading.waits, self._began)
            self._keep(request.story(request.outcome))
            return 0.0 if request.outcome == "finished" else AFTER_ERROR_S
        return NOBODY_S


class _Request:
    """One question to one node. `outcome` stays None if nobody was there to be asked."""

    def __init__(self, node: Node, question: Question, right: Answer) -> None:
        self.reading = Reading()
        self.outcome: Outcome | None = None
        self.why = ""
        self._node = node
        self._question = question
        self._right = right
        self._sent = trio.current_time()

    def story(self, outcome: Outcome) -> Story:
        return Story(
            id=self.reading.id,
            node=self._node.name,
            sent=self._sent,
            ended=trio.current_time(),
            timeout=self._question.timeout,
            gaps=self.reading.gaps,
            outcome=outcome,
            why=self.why,
        )

    async def run(self) -> None:
        life, began, expected = self._node.lives, self._sent, self._node.answers
        complete = False
        with trio.move_on_after(PATIENCE_S) as limit:
            try:
                complete = await ask(self._node, self._question, self.reading)
            except Refused as error:
                self._error(f"{error.status} ", error.body, PROPER.get(error.status, "").split())
            except BrokeOff as error:
                self._error("in the stream, ", error.body, PROPER.values())
            except BROKEN as error:
                gone = not self._node.answers or self._node.lives != life
                self._broken(error, expected=expected, gone=gone)
            else:
                self._ended(complete)
        if limit.cancelled_caught:
            self.outcome, self.why = "lost", f"no end within {PATIENCE_S:g} s"
        self.reading.note_gap()
        self.reading.waits.frozen = self._node.was_frozen(began, trio.current_time())
        self._check_beginning()

    def _ended(self, complete: bool) -> None:
        found, right = self.reading.answer(), self._right
        if not complete:
            self.outcome, self.why = "lost", f"no [DONE] after {found.text!r}"
        elif found == right:
            self.outcome = "finished"
        else:
            self.outcome, self.why = "wrong", f"{found} instead of {right}"

    def _error(self, where: str, body: bytes, proper: Collection[str]) -> None:
        try:
            found = _decode(body)
        except msgspec.MsgspecError:
            self.outcome, self.why = "wrong", f"{where}not an error object: {body[:300]!r}"
            return
        if found.code in proper:
            self.outcome, self.why = "error", f"{where}{found.code}"
        else:
            self.outcome, self.why = "wrong", f"{where}{found.code}: {found.message}"

    def _broken(self, error: Exception, *, expected: bool, gone: bool) -> None:
        if isinstance(error, OSError) and not (expected and not gone):
            # Nobody was there to take the request.
            return
        self.outcome = "cut" if gone else "lost"
        self.why = "the connection to its own node broke" if gone else f"{error!r}"

    def _check_beginning(self) -> None:
        """However it ended: what came before the end must be right."""
        if self.outcome != "wrong" and not self._right.text.startswith(self.reading.text):
            self.outcome = "wrong"
            self.why = f"{self.reading.text!r} is not how {self._right.text!r} begins"


def _decode(body: bytes) -> _Error:
    """The error object of a response, or of the last event of a stream."""
    try:
        return msgspec.json.decode(body, type=_Envelope).error
    except msgspec.ValidationError:
        return msgspec.json.decode(body, type=_Error)
