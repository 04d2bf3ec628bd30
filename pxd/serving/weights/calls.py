"""What nodes say to each other about the files of models."""

from typing import Annotated

import msgspec

from pxd.models.chunks import CHUNK_BYTES, DIGEST_BYTES
from pxd.models.manifest import FileName, Fingerprint, Manifest
from pxd.models.transfer import ASK_BYTES
from pxd.p2p.network import Method
from pxd.wire import Count, Name

MAX_DIGESTS = 1024
"""In one call; to compute so many is `CHUNK_BYTES` each to read."""

MAX_CHUNKS = 4096
Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


class Open(msgspec.Struct, frozen=True):
    """Asks what the node has of a model, by the name that its record gives it."""

    model: Name


class Which(msgspec.Struct, frozen=True):
    """One file of one revision of a model: both as in its `Manifest`."""

    model: Name
    fingerprint: Fingerprint
    mark: Fingerprint
    file: FileName


class DigestsOf(msgspec.Struct, frozen=True):
    """Asks for the digests of chunks of weights, in the order of `chunks`."""

    which: Which
    chunks: Annotated[tuple[Index, ...], msgspec.Meta(min_length=1, max_length=MAX_DIGESTS)]


class Digests(msgspec.Struct, frozen=True):
    """One after the other."""

    digests: Annotated[bytes, msgspec.Meta(max_length=MAX_DIGESTS * DIGEST_BYTES)]


class ReadChunks(msgspec.Struct, frozen=True):
    """Asks for chunks of weights, which come one after the other in a frame `Weights` of this
    `number` before the call is answered."""

    number: Count
    which: Which
    chunks: Annotated[tuple[Index, ...], msgspec.Meta(min_length=1, max_length=MAX_CHUNKS)]


class ReadSmall(msgspec.Struct, frozen=True):
    """Asks for bytes [offset, offset + size) of a metadata file or of a header, likewise."""

    number: Count
    which: Which
    offset: Count
    size: Annotated[int, msgspec.Meta(ge=1, le=ASK_BYTES)]


class Sent(msgspec.Struct, frozen=True):
    """What was asked for is on its way. `busy`: this node also serves requests, so that one chunk
    at a time is enough."""

    busy: bool


OPEN = Method("pxd.model.open", Open, Manifest, limit=4096)
DIGESTS = Method("pxd.model.digests", DigestsOf, Digests, limit=64 << 10)
READ_CHUNKS = Method("pxd.model.read", ReadChunks, Sent, limit=64 << 10)
READ_SMALL = Method("pxd.model.read-small", ReadSmall, Sent, limit=4096)

NOT_HERE = "not-here"
"""The code of an error: this node does not have what was asked for, or not any more."""

assert CHUNK_BYTES <= ASK_BYTES
