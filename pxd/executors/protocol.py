"""What every executor offers, on both sides of its pipe.

`Engine` is the model side, synchronous, inside the worker process. `Executor` is the daemon side,
asynchronous, and owns that process (`process.py`). Between them run the frames of `messages.py`.
"""

from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

import msgspec

from pxd.wire import Buffer, Coding, Count, Logprobs, Nack, NackCode, Reason, Sampled, Step, Tensor


class ExecutorError(Exception):
    """The executor refused or failed a command but is still usable."""


class ExecutorDied(Exception):
    """The worker process is gone or hung; nothing it held exists any more."""


class LoadSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Which layers of which model to load. `path` is a directory in Hugging Face layout.

    `fingerprint`, where not empty, must equal `ModelDescription.fingerprint` of the directory.
    `kv_bytes` bounds the KV caches of all requests together. `tier_bytes` bounds what the second
    tier keeps of them: in memory of the host where the device has its own, else in a file in
    `tier_directory`; 0 means none. The stage is spread over `tensor_parallel` GPUs of this machine.
    """

    path: str
    start: int
    end: int
    fingerprint: str = ""
    kv_bytes: int = 0
    tier_bytes: int = 0
    tier_directory: str = ""
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1


class StageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was loaded: bytes of weights, and how many token positions of KV fit `kv_bytes`.

    `hidden_bytes` is what the hidden state of one position takes as it is. `prefix_cache` says that
    requests can begin with blocks that others have left, `tier_slots` how many blocks the second
    tier can keep, and `trims` that positions can be taken back.
    """

    layers: int
    hidden_size: int
    weight_bytes: int
    kv_tokens: int
    hidden_bytes: int = 0
    prefix_cache: bool = False
    tier_slots: int = 0
    trims: bool = False


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes in use: by tensors (weights and caches), and the process's resident set with what the
    second KV tier has of the host's memory.

    `held` is how many blocks of KV the `requests` hold that have not ended, and `kept` how many
    are kept of those that have.
    """

    active: int
    resident: int
    requests: int
    held: Count = 0
    kept: Count = 0


class ModelDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What planning and serving need to know of a model; nothing is loaded to find it out.

    `hidden_size` is how many numbers cross a cut for each position, at the widest.
    `layer_bytes` holds the exact weight bytes of each decoder layer, `embedding_bytes` those of the
    input end and `head_bytes` those of the output end (norm and projection; a tied projection
    counts here too, since a last stage that is not the first holds its own copy). `splits` are the
    layer indices at which a pipeline may be cut. `unsupported` says why the model cannot be served
    in stages; empty if it can. `kv_bytes_per_token` is per layer.
    """

    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    context: int
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_token: tuple[int, ...]
    splits: tuple[int, ...]
    eos: tuple[int, ...]
    fingerprint: str
    unsupported: Reason = ""


class Scored(NamedTuple):
    """A token id with the log probabilities that its request asked for."""

    token: int
    logprobs: Logprobs


Progress = Callable[[float], None]
StepResult = Sampled | Nack | tuple[Step, Buffer] | ExecutorError | ExecutorDied
"""What became of a step: one to forward, the sampled tokens, or why there is neither."""

Drawn = int | Scored
StepOutput = tuple[Tensor, Buffer] | tuple[Drawn, ...]
"""Hidden states, or on a last stage one token id for each of `pxd.executors.rows.draws_of`."""


class StepRejected(Exception):
    """A step that this engine cannot run; `requests` are those whose state is lost or unknown."""

    def __init__(self, code: NackCode, reason: str, requests: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.code, self.reason, self.requests = code, reason, requests


class Engine(Protocol):
    """Runs one stage inside the worker process. Not thread-safe; one thread calls everything."""

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        """Load layers [start, end). Raises `ExecutorError` with a reason a person can act on."""

    def step(self, step: Step, body: Buffer) -> StepOutput:
        """Run a batch. Raises `StepRejected` for an unknown request or a position gap.

        The first step of another session frees all requests of the last one.
        """

    def send_as(self, coding: Coding | None) -> None:
        """Code the hidden states of later steps; None leaves them as they are."""

    def memory(self) -> MemoryReport: ...


class Executor(Protocol):
    """The daemon's handle on one worker process. Every method raises `ExecutorDied`.

    Steps may be submitted while earlier ones run: they run one after the other without a pause, and
    return in order. A worker that gives no answer for far longer than it should take is killed:
    `hung` says that this was its end.
    """

    pid: int
    hung: bool

    async def load(self, spec: LoadSpec, progress: Progress) -> StageInfo: ...

    def submit(self, step: Step, body: Buffer, take: Callable[[StepResult], None]) -> None:
        """Run a step and call `take`, which must neither block nor raise, with what became of it.

        `body` must not be changed before that.
        """

    def send_as(self, coding: Coding | None) -> None:
        """How steps that are submitted later code their hidden states."""

    async def memory(self) -> MemoryReport: ...

    async def aclose(self) -> None:
        """End the process and reap it; safe to call twice and under cancellation."""
