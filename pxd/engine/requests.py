"""What the step scheduler knows of one request."""

import math
from collections.abc import Sequence as Items

import msgspec

from pxd.engine.hashing import BlockHashes
from pxd.engine.history import history_of
from pxd.engine.speculation import Guesser
from pxd.wire import Finish, History, Logprobs, Sampling


class NewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it is handed to the scheduler. `number` is never used again.

    `tokens` is the prompt, with what an earlier try has generated behind it; that are the last
    `generated`, and `max_new` more may follow. A lower `priority` goes first; sources take turns,
    and so do the clients of one `source`. `deadline` is on the clock of `Scheduler.expire`.
    """

    number: int
    tokens: Items[int]
    max_new: int
    sampling: Sampling
    generated: int = 0
    eos: frozenset[int] = frozenset()
    priority: int = 0
    source: str = ""
    client: str = ""
    deadline: float = math.inf


class Generated(msgspec.Struct, frozen=True):
    """One step's result for a request: mostly one token, more where guesses came true.

    An end-of-sequence token is not among `tokens`.

    `logprobs` are those of `tokens`, where the request asked for them.
    """

    request: int
    tokens: tuple[int, ...]
    finish: Finish | None
    logprobs: tuple[Logprobs, ...] = ()


class Sequence:
    """A request under way.

    Of its positions `sent` are on their way through the pipeline or done, and `done` have been
    through every stage. `awaiting` says that a step in flight will draw its next token; the
    `guesses` at it and those behind it that run along are among `sent`. `blocks` is its block
    table, of which stages know the first `granted`. `pinned` are blocks of others that its opening
    copies from. The first `prompt` of `tokens` are not answer. While `loading`, what
    follows `done` comes from the second tier, and no step has rows of it.
    """

    __slots__ = (
        "admitted",
        "awaiting",
        "blocks",
        "client",
        "deadline",
        "done",
        "eos",
        "granted",
        "guesser",
        "guesses",
        "hashes",
        "hits",
        "limit",
        "loading",
        "number",
        "opened",
        "pinned",
        "preemptions",
        "priority",
        "prompt",
        "registered",
        "sampling",
        "sent",
        "source",
        "tokens",
    )

    def __init__(self, request: NewRequest, hashes: BlockHashes) -> None:
        self.number = request.number
        self.tokens = list(request.tokens)
        self.prompt = max(len(self.tokens) - request.generated, 0)
        self.limit = len(self.tokens) + request.max_new
        self.sampling = request.sampling
        self.eos = request.eos
        self.priority = request.priority
        self.source = request.source
        self.client = request.client
        self.deadline = request.deadline
        self.hashes = hashes
        self.admitted = 0
        self.preemptions = 0
        self.guesser: Guesser | None = None
        self.reset()

    def reset(self) -> None:
        """Nothing of it is on any stage."""
        self.sent = self.done = 0
        self.awaiting = self.opened = self.loading = False
        self.blocks: list[int] = []
        self.hits: tuple[int, ...] = ()
        self.pinned: list[int] = []
        self.guesses: list[int] = []
        self.granted = self.registered = 0

    def history(self) -> History | None:
        """What the last stage needs to go on from here; None where it needs nothing."""
        return history_of(self.sampling, self.tokens, self.prompt)

    @property
    def prefill_left(self) -> int:
        """Positions before the last known token that a step may take now."""
        return 0 if self.loading else len(self.tokens) - 1 - self.sent

    @property
    def can_decode(self) -> bool:
        """Only the last known token is to be fed, and its successor drawn."""
        return not (self.awaiting or self.loading) and self.sent == len(self.tokens) - 1

    @property
    def is_idle(self) -> bool:
        """No step in flight has rows of it, and nothing is copied into its blocks."""
        return not (self.awaiting or self.loading) and self.sent == self.done
