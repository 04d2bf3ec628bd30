"""Both ends of a connection prove that they hold the cluster key, before anything else is said.

The dialer opens a stream and sends a nonce; the listener answers with its own, which says nothing
about the key; the dialer sends an HMAC-SHA256 over the whole exchange; only when that is right
does the listener send its own. Bound to both peer ids as Noise authenticated them, so a proof
cannot be passed on to a third party, and to the role, so it cannot be sent back.
"""

import contextlib
import hmac
import secrets
from typing import Literal, NoReturn

import trio

from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.wire import PROTOCOL_VERSION

PROTOCOL = "/pxd/proof/1"
NONCE_BYTES = 32
MAC_BYTES = 32
INSTANCE_BYTES = 16
REFUSAL_GRACE = 1.0

Role = Literal["dialer", "listener"]

_DOMAIN = b"pxd cluster key proof 1"
_HELLO_BYTES = NONCE_BYTES + INSTANCE_BYTES + 2
_OK, _WRONG_KEY, _VERSION = b"ok......", b"wrongkey", b"version."
_WORD_BYTES = 8


class ProofFailed(Exception):
    """`reason` is one word: wrong-key, version, or protocol for a peer that does not play along."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Hello:
    """What one side says first: a fresh nonce, which life of its process this is, its version."""

    def __init__(self, nonce: bytes, instance: bytes, version: int = PROTOCOL_VERSION) -> None:
        self.nonce = nonce
        self.instance = instance
        self.version = version

    @classmethod
    def fresh(cls, instance: bytes) -> "Hello":
        return cls(secrets.token_bytes(NONCE_BYTES), instance)

    def encode(self) -> bytes:
        return self.nonce + self.instance + self.version.to_bytes(2, "big")

    @classmethod
    def decode(cls, data: bytes) -> "Hello":
        return cls(
            data[:NONCE_BYTES],
            data[NONCE_BYTES:-2],
            int.from_bytes(data[-2:], "big"),
        )


def proof(
    key: bytes, role: Role, dialer: str, listener: str, dialer_says: bytes, listener_says: bytes
) -> bytes:
    """The MAC that `role` sends; the last two arguments are the encoded hellos."""
    parts = (
        _DOMAIN,
        role.encode(),
        dialer.encode(),
        listener.encode(),
        dialer_says,
        listener_says,
    )
    # Each part is preceded by its length, so that no two different exchanges look alike.
    transcript = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.digest(key, transcript, "sha256")


def is_proof(mac: bytes, expected: bytes) -> bool:
    return hmac.compare_digest(mac, expected)


class KeyProof:
    """Runs the exchange for one node. The caller sets the deadline."""

    def __init__(self, key: bytes, peer_id: str) -> None:
        self.instance = secrets.token_bytes(INSTANCE_BYTES)
        self._key = key
        self._peer_id = peer_id

    async def dial(self, stream: YamuxStream, peer: str) -> bytes:
        """Prove to `peer` and have it prove; returns its instance. Raises `ProofFailed`."""
        mine = Hello.fresh(self.instance)
        try:
            await stream.write(mine.encode())
            theirs = Hello.decode(bytes(await stream.read_exactly(_HELLO_BYTES)))
            says = (mine.encode(), theirs.encode())
            await stream.write(proof(self._key, "dialer", self._peer_id, peer, *says))
            word = bytes(await stream.read_exactly(_WORD_BYTES))
            if word == _VERSION:
                _fail_version(theirs.version)
            if word == _WRONG_KEY:
                raise ProofFailed("wrong-key", "it says that this node holds another cluster's key")
            if word != _OK:
                raise ProofFailed("protocol", "its answer to the key proof makes no sense")
            mac = bytes(await stream.read_exactly(MAC_BYTES))
        except StreamClosed as error:
            raise ProofFailed("protocol", f"it broke off the key proof ({error})") from error
        if not is_proof(mac, proof(self._key, "listener", self._peer_id, peer, *says)):
            raise ProofFailed("wrong-key", "it does not hold this cluster's key")
        return theirs.instance

    async def listen(self, stream: YamuxStream, peer: str) -> bytes:
        """The other side of `dial`."""
        mine = Hello.fresh(self.instance)
        try:
            theirs = Hello.decode(bytes(await stream.read_exactly(_HELLO_BYTES)))
            await stream.write(mine.encode())
            says = (theirs.encode(), mine.encode())
            mac = bytes(await stream.read_exactly(MAC_BYTES))
            if theirs.version != PROTOCOL_VERSION:
                await _refuse(stream, _VERSION)
                _fail_version(theirs.version)
            if not is_proof(mac, proof(self._key, "dialer", peer, self._peer_id, *says)):
                await _refuse(stream, _WRONG_KEY)
                raise ProofFailed("wrong-key", "it does not hold this cluster's key")
            await stream.write(_OK + proof(self._key, "listener", peer, self._peer_id, *says))
        except StreamClosed as error:
            raise ProofFailed("protocol", f"it broke off the key proof ({error})") from error
        return theirs.instance


async def _refuse(stream: YamuxStream, word: bytes) -> None:
    """Send the word and let the peer close first: closing under unread data would destroy it."""
    await stream.write(word)
    with trio.move_on_after(REFUSAL_GRACE), contextlib.suppress(StreamClosed):
        await stream.read_some(1)


def _fail_version(version: int) -> NoReturn:
    raise ProofFailed(
        "version", f"it speaks version {version} of pxd's protocol, this node {PROTOCOL_VERSION}"
    )
