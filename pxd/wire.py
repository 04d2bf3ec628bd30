"""Frames: the one wire format of data channels and executor pipes.

A frame is ``>II`` (header length, body length), a msgpack header and raw body bytes. The header is
one of a closed set of msgspec structs; the body is tensor data described by the header's `Tensor`.
Both lengths are checked against `Limits` before anything is allocated.
"""

import math
import struct
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec

PROTOCOL_VERSION = 4

_PREFIX = struct.Struct(">II")
PREFIX_SIZE = _PREFIX.size
_PIECE = 256 << 10

Buffer = bytes | bytearray | memoryview
HeaderT = TypeVar("HeaderT")

DECODE_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""All that msgspec's decoders raise on bytes that are no message: `DecodeError` alone leaves out
strings that are not UTF-8 and values nested too deeply."""


class WireError(Exception):
    """Bytes that do not form a valid frame; the connection they came from is not usable again."""


class Limits(msgspec.Struct, frozen=True):
    """Upper bounds in bytes for what a peer may make us allocate with one frame."""

    header: int = 1 << 20
    body: int = 256 << 20


Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Seed = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
Name = Annotated[str, msgspec.Meta(max_length=512)]
Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Reason = Annotated[str, msgspec.Meta(max_length=2000)]
Priority = Annotated[int, msgspec.Meta(ge=-10, le=10)]
"""Lower is earlier."""

MAX_TIMEOUT_S = 24 * 3600.0
Timeout = Annotated[float, msgspec.Meta(gt=0, le=MAX_TIMEOUT_S)]

DType = Literal["bf16", "f16", "f32", "i32"]
DTYPE_BYTES: dict[DType, int] = {"bf16": 2, "f16": 2, "f32": 4, "i32": 4}

Coding = Literal["fp8", "int8"]
SCALE_BYTES = 4


class Tensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """Type and shape of a frame's body: row-major, little-endian, no padding.

    With a `coding` the shape is ``(rows, columns)`` and `dtype` is what the numbers were and shall
    be again. The body then holds one f32 scale for each row, finite and not negative, and behind
    them one byte for each number, to be multiplied by its row's scale: an fp8 is an e4m3 of the
    kind without infinities.
    """

    dtype: DType
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=8)]
    coding: Coding | None = None

    def __post_init__(self) -> None:
        if self.coding is not None and (self.dtype == "i32" or len(self.shape) != 2):
            raise ValueError("only rows of floating-point numbers can be coded")

    @property
    def scale_bytes(self) -> int:
        return self.shape[0] * SCALE_BYTES if self.coding is not None else 0

    @property
    def nbytes(self) -> int:
        count = math.prod(self.shape)
        return self.scale_bytes + count * (1 if self.coding else DTYPE_BYTES[self.dtype])


LogitBias = tuple[TokenId, Annotated[float, msgspec.Meta(ge=-100, le=100)]]
Penalty = Annotated[float, msgspec.Meta(ge=-2, le=2)]
MAX_LOGPROBS = 20
LEAST_LOGPROB = -9999.0
MAX_BIASES = 1024
MAX_ENDS = 256


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request's tokens are drawn; `pxd.engine.sampling` says in which order these apply.

    Temperature 0 is greedy, `top_k` 0 takes all. The random number for a token depends on `seed`
    and the token's position alone, so a replay on another pipeline or in another batch draws the
    same token. The penalties depend on the tokens before it besides, see `History`. A token of
    `barred` is not drawn for a position below `min_length`, which counts the prompt, too.
    `logprobs` asks for that many of the likeliest tokens' log probabilities beside that of the
    token drawn, None for none at all.
    """

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    top_k: Count = 0
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    seed: Seed = 0
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[tuple[LogitBias, ...], msgspec.Meta(max_length=MAX_BIASES)] = ()
    min_length: Count = 0
    barred: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_ENDS)] = ()
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None


MAX_HISTORY = 1 << 19
"""Tokens of a request with penalties: what its `History` takes stays within a header's limit."""


class History(msgspec.Struct, frozen=True, omit_defaults=True):
    """The tokens that a request's penalties count, when it opens; the last stage goes on from here.

    Both are ascending, each token as its distance from the one before it (from 0 for the first):
    one byte each, mostly. `prompt` has every token once, `answer` as often as it was drawn.
    """

    prompt: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_HISTORY)] = ()
    answer: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_HISTORY)] = ()


MAX_GUESSES = 16
"""Tokens of a row that the head has only guessed."""


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One request's share of a step: `count` positions from `position` on.

    The rows' positions lie one after the other in the step's tensor, in row order. For each of the
    row's last `draws` positions the last stage draws the token that follows it.

    Where there are several draws, all tokens behind the first of these positions are guesses. The
    request's next row may take back those that were wrong: it then begins that much further ahead,
    and every stage forgets what it has from there on.
    """

    request: Count
    position: Count
    count: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    draws: Annotated[int, msgspec.Meta(ge=0, le=1 + MAX_GUESSES)]


MAX_DRAWS = 4096
"""Draws of a step, over all of its rows."""


class Opening(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request that first appears with this step; its first row has position `cached`.

    What is before `cached` comes from the blocks `hits`, in their order. Those that are also at the
    same place of the request's own table stay where they are; the others are copied before anything
    else of this step. Only requests with penalties have a `history`.
    """

    request: Count
    sampling: Sampling
    cached: Count = 0
    hits: Annotated[tuple[Count, ...], msgspec.Meta(max_length=65536)] = ()
    history: History | None = None


class Grant(msgspec.Struct, frozen=True, array_like=True):
    """Further blocks of a request's table, in the order of its positions.

    Whatever a granted block held before is forgotten, unless it is among the request's `hits`.
    """

    request: Count
    blocks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=65536)]


MAX_COPY_BLOCKS = 65536


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Blocks to be copied to or from slots of the second tier, pair by pair.

    Each stage answers with one `Copied`, in the order of the events.
    """

    event: Count
    blocks: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_COPY_BLOCKS)]
    slots: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_COPY_BLOCKS)]


class Step(msgspec.Struct, frozen=True, tag="step", kw_only=True):
    """One batch through a pipeline. Sent from stage to stage; the body holds hidden states.

    `tensor` is i32 ``(tokens,)`` on the way into stage 0 and ``(tokens, hidden)`` after it.
    Step numbers grow within a session and steps run in that order on every stage. `releases` are
    applied before, `openings` after them, both before the rows run. A step may have no rows.
    `session` names one life of the head's scheduler: with a new one, a stage forgets every request
    of the old. `store` copies blocks as they are before the openings; `load` fills blocks that are
    granted by now and that no row of this step uses. Both may go on while later steps run.
    """

    pipeline: Identifier
    session: Count
    step: Count
    rows: Annotated[tuple[Row, ...], msgspec.Meta(max_length=4096)]
    tensor: Tensor
    openings: Annotated[tuple[Opening, ...], msgspec.Meta(max_length=4096)] = ()
    grants: Annotated[tuple[Grant, ...], msgspec.Meta(max_length=4096)] = ()
    releases: Annotated[tuple[Count, ...], msgspec.Meta(max_length=65536)] = ()
    store: Copy | None = None
    load: Copy | None = None


Logprob = Annotated[float, msgspec.Meta(ge=LEAST_LOGPROB, le=0)]


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logarithms of what the model itself thinks: before temperature, bias and penalties.

    `token` is that of the token drawn; `top` are the likeliest tokens, likeliest first. What is
    less likely, or impossible, has `LEAST_LOGPROB`.
    """

    token: Logprob
    top: Annotated[tuple[tuple[TokenId, Logprob], ...], msgspec.Meta(max_length=MAX_LOGPROBS)] = ()


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """The token drawn for `request`; `position` is the place it takes in the sequence."""

    request: Count
    position: Count
    token: TokenId
    logprobs: Logprobs | None = None


class Sampled(msgspec.Struct, frozen=True, tag="sampled", kw_only=True):
    """What the last stage sends straight back to the head after a step.

    One token for each draw of the step's rows: in row order, and of a row by position.
    """

    pipeline: Identifier
    session: Count
    step: Count
    tokens: Annotated[tuple[SampledToken, ...], msgspec.Meta(max_length=MAX_DRAWS)]


class Copied(msgspec.Struct, frozen=True, tag="copied", kw_only=True):
    """A stage is done with a `Copy`, except for the slots `failed`. Sent straight to the head."""

    pipeline: Identifier
    session: Count
    event: Count
    failed: Annotated[tuple[Count, ...], msgspec.Meta(max_length=MAX_COPY_BLOCKS)] = ()


NackCode = Literal[
    "unknown-pipeline",
    "not-ready",
    "unknown-request",
    "bad-step",
    "executor-failed",
    "out-of-memory",
    "not-finite",
    "executor-died",
    "unreachable",
]


class Nack(msgspec.Struct, frozen=True, tag="nack", kw_only=True):
    """A stage could not run a step, or could not pass it on. Sent to the head.

    The requests of the step are lost in any case. `requests` names further ones that lost their
    state on that stage; with code executor-died it is every request of the pipeline. With
    out-of-memory a smaller step may do; not-finite says that NaN or infinity was computed.
    """

    pipeline: Identifier
    session: Count
    step: Count
    code: NackCode
    reason: Reason
    requests: Annotated[tuple[Count, ...], msgspec.Meta(max_length=65536)] = ()


Finish = Literal["stop", "length"]


class Output(msgspec.Struct, frozen=True, tag="output", kw_only=True, omit_defaults=True):
    """New tokens of a request, from the head to the ingress.

    `index` is the place of the first of `tokens` among the request's generated tokens, counted from
    0 including those the ingress handed over at submission. `logprobs` are one for each of `tokens`
    or, where nobody asked, none. `failure` names why the head gave the request up; the ingress may
    submit it again elsewhere.
    """

    request: Identifier
    index: Count
    tokens: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=65536)] = ()
    logprobs: Annotated[tuple[Logprobs, ...], msgspec.Meta(max_length=65536)] = ()
    finish: Finish | None = None
    failure: Reason | None = None

    def __post_init__(self) -> None:
        if self.logprobs and len(self.logprobs) != len(self.tokens):
            raise ValueError("log probabilities are for all tokens or for none")


class Cancel(msgspec.Struct, frozen=True, tag="cancel", kw_only=True):
    """The ingress no longer wants a request; the head frees it on every stage."""

    request: Identifier


class Filler(msgspec.Struct, frozen=True, tag="filler", kw_only=True):
    """A body of no meaning, one of round `round` of a measurement of bandwidth.

    Sent only with the receiver's leave.
    """

    number: Count
    round: Count
    tensor: Tensor


MAX_WEIGHTS_BYTES = 1 << 20


class Weights(msgspec.Struct, frozen=True, tag="weights", kw_only=True):
    """Bytes of a model's files, `size` of them, which the receiver has asked for as `number`."""

    number: Count
    size: Annotated[int, msgspec.Meta(ge=1, le=MAX_WEIGHTS_BYTES)]


Frame = Step | Sampled | Copied | Nack | Output | Cancel | Filler | Weights
"""Everything that travels on a data channel."""

_encoder = msgspec.msgpack.Encoder()
frame_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def encode(header: Any, body_size: int = 0, limits: Limits | None = None) -> bytes:
    """Return prefix and header; the caller sends `body_size` bytes of body right behind them.

    Raises `WireError` when the frame would break `limits`, so that the sender learns of it and
    not the receiver.
    """
    limits = limits or Limits()
    data = _encoder.encode(header)
    if len(data) > limits.header or body_size > limits.body:
        raise WireError(f"frame too large: header {len(data)}, body {body_size} bytes")
    return _PREFIX.pack(len(data), body_size) + data


def rest_of(parts: Sequence[Buffer], sent: int) -> list[memoryview]:
    """What is left of `parts` once `sent` bytes of them are gone."""
    rest = []
    for part in parts:
        view = memoryview(part)[sent:]
        sent = max(0, sent - len(part))
        if len(view):
            rest.append(view)
    return rest


def decode_prefix(prefix: Buffer, limits: Limits) -> tuple[int, int]:
    """Return (header length, body length); raises `WireError` when either breaks `limits`."""
    header, body = _PREFIX.unpack(prefix)
    if not 0 < header <= limits.header or body > limits.body:
        raise WireError(f"refusing a frame of header {header}, body {body} bytes")
    return header, body


def decode_header(
    data: Buffer, body_size: int, decoder: "msgspec.msgpack.Decoder[HeaderT]"
) -> HeaderT:
    """Decode and check a header; its `tensor` or `size`, where it has one, must be the body's."""
    try:
        header = decoder.decode(data)
    except DECODE_ERRORS as error:
        raise WireError(f"bad header: {error}") from error
    tensor = getattr(header, "tensor", None)
    expected = tensor.nbytes if isinstance(tensor, Tensor) else 0
    if isinstance(header, Weights):
        expected = header.size
    if expected != body_size:
        raise WireError(f"body of {body_size} bytes where the header says {expected}")
    return header


async def read_frame(
    read_exactly: Callable[[int], Awaitable[Buffer]],
    decoder: "msgspec.msgpack.Decoder[HeaderT]",
    limits: Limits | None = None,
    wants: Callable[[HeaderT], bool] = lambda _: True,
) -> tuple[HeaderT, Buffer]:
    """Read one frame with `read_exactly(n)`, which must return n bytes or raise.

    Where the header does not make `wants` want the body, it is read past and returned empty.
    """
    limits = limits or Limits()
    header_size, body_size = decode_prefix(await read_exactly(PREFIX_SIZE), limits)
    header = decode_header(await read_exactly(header_size), body_size, decoder)
    if body_size and wants(header):
        return header, await read_exactly(body_size)
    for passed in range(0, body_size, _PIECE):
        await read_exactly(min(_PIECE, body_size - passed))
    return header, b""
