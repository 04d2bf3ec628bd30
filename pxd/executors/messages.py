"""Frames between the daemon and a worker process, in the framing of `pxd.wire`.

The daemon sends commands. The worker runs them strictly in order and answers each with exactly one
reply, except `SendAs`, which has none; `LoadProgress` frames may come before the reply to `Load`
and `Quantize`, and `Copied` at any time.
"""

from typing import Annotated

import msgspec

from pxd.cluster.records import Device
from pxd.executors.protocol import LoadSpec, MemoryReport, ModelDescription, StageInfo
from pxd.wire import Coding, Copied, Nack, Reason, Sampled, Step


class Load(msgspec.Struct, frozen=True, tag="load"):
    spec: LoadSpec


class SendAs(msgspec.Struct, frozen=True, tag="send-as"):
    """How hidden states of later steps are coded; None leaves them as they are."""

    coding: Coding | None


class ReadMemory(msgspec.Struct, frozen=True, tag="read-memory"):
    pass


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    path: str


class Measure(msgspec.Struct, frozen=True, tag="measure"):
    pass


class Quantize(msgspec.Struct, frozen=True, tag="quantize"):
    """Write a quantised copy of the model in `source` into the new directory `target`."""

    source: str
    target: str
    bits: int


class LoadProgress(msgspec.Struct, frozen=True, tag="progress"):
    done: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Loaded(msgspec.Struct, frozen=True, tag="loaded"):
    info: StageInfo


class Memory(msgspec.Struct, frozen=True, tag="memory"):
    report: MemoryReport


class Described(msgspec.Struct, frozen=True, tag="described"):
    description: ModelDescription


class Measured(msgspec.Struct, frozen=True, tag="measured"):
    device: Device


class Quantized(msgspec.Struct, frozen=True, tag="quantized"):
    pass


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A command other than a step could not be carried out; the worker goes on."""

    reason: Reason


Command = Load | Step | SendAs | ReadMemory | Describe | Measure | Quantize
Reply = (
    LoadProgress
    | Loaded
    | Step
    | Sampled
    | Copied
    | Nack
    | Memory
    | Described
    | Measured
    | Quantized
    | Failed
)

command_decoder: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
