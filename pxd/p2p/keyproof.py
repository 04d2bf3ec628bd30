"""Both ends of a connection prove that they hold the cluster key, before anything else is said.

The dialer opens a stream and sends a nonce; the listener answers with its own, which says nothing
about the key; the dialer sends an HMAC-SHA256 over the whole exchange for each key that it holds;
only when one of them is right does the listener send its own, made with that key. The MACs are
bound to both peer ids as Noise authenticated them and to the Noise session itself, so a proof can
neither be passed on to a third party nor be used in another connection; and to the role, so it
cannot be sent back.
"""

import contextlib
import hmac
import secrets
from typing import Literal, NoReturn

import trio

from pxd.p2p.admission import Admission
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.wire import PROTOCOL_VERSION

PROTOCOL = "/pxd/proof/1"
NONCE_BYTES = 32
MAC_BYTES = 32
INSTANCE_BYTES = 16
KEYS_LIMIT = 2
REFUSAL_GRACE = 1.0

Role = Literal["dialer", "listener"]

_DOMAIN = b"pxd cluster key proof 2"
_HELLO_BYTES = NONCE_BYTES + INSTANCE_BYTES + 2
_OK = b"ok......"
_WORD_BYTES = len(_OK)
_REFUSALS = {
    "wrong-key": b"wrongkey",
    "old-key": b"oldkey..",
    "banned": b"banned..",
    "version": b"version.",
}
_HEARD = {
    b"wrongkey": "it says that this node holds another cluster's key",
    b"oldkey..": "it says that the cluster's key was replaced while this node was away",
    b"banned..": "it says that this node was kicked out of the cluster",
}
"""What the dialer makes of a refusal; "version" is told apart because both versions are known."""


class ProofFailed(Exception):
    """`reason` is one word: wrong-key, old-key (the cluster's key was replaced), banned, version,
    or protocol for a peer that does not play along."""

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


class Exchange:
    """What a proof is bound to. `session` is the hash of the Noise handshake; hellos encoded."""

    def __init__(
        self, session: bytes, dialer: str, listener: str, dialer_says: bytes, listener_says: bytes
    ) -> None:
        self._parts = (session, dialer.encode(), listener.encode(), dialer_says, listener_says)

    def mac(self, key: bytes, role: Role) -> bytes:
        """The proof that `role` sends."""
        # Each part is preceded by its length, so that no two different exchanges look alike.
        parts = (_DOMAIN, role.encode(), *self._parts)
        transcript = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(key, transcript, "sha256")

    def prover(self, macs: list[bytes], keys: tuple[bytes, ...], role: Role) -> bytes | None:
        """The first of `keys` with which one of `macs` was made in `role`."""
        found = None
        for key in reversed(keys):
            expected = self.mac(key, role)
            if any(hmac.compare_digest(mac, expected) for mac in macs):
                found = key
        return found


class KeyProof:
    """Runs the exchange for one node. The caller sets the deadline.

    `session` is `NoiseConnection.binding` of the connection that carries the stream.
    """

    def __init__(self, admission: Admission, peer_id: str) -> None:
        self.instance = secrets.token_bytes(INSTANCE_BYTES)
        self._admission = admission
        self._peer_id = peer_id

    @property
    def banned(self) -> frozenset[str]:
        return self._admission.banned

    async def dial(self, stream: YamuxStream, peer: str, session: bytes) -> bytes:
        """Prove to `peer` and have it prove; returns its instance. Raises `ProofFailed`."""
        if peer in self._admission.banned:
            raise ProofFailed("banned", "it was kicked out of the cluster")
        mine = Hello.fresh(self.instance)
        keys = self._admission.keys()[:KEYS_LIMIT]
        try:
            await stream.write(mine.encode())
            theirs = Hello.decode(bytes(await stream.read_exactly(_HELLO_BYTES)))
            if theirs.version != PROTOCOL_VERSION:
                # An older listener looks at the version only after it has read a MAC.
                await stream.write(bytes(MAC_BYTES))
                _fail_version(theirs.version)
            exchange = Exchange(session, self._peer_id, peer, mine.encode(), theirs.encode())
            macs = b"".join(exchange.mac(key, "dialer") for key in keys)
            await stream.write(bytes([len(keys)]) + macs)
            word = bytes(await stream.read_exactly(_WORD_BYTES))
            _check_word(word, theirs)
            mac = bytes(await stream.read_exactly(MAC_BYTES))
        except StreamClosed as error:
            raise ProofFailed("protocol", f"it broke off the key proof ({error})") from error
        if exchange.prover([mac], keys, "listener") is None:
            raise ProofFailed("wrong-key", "it does not hold this cluster's key")
        return theirs.instance

    async def listen(self, stream: YamuxStream, peer: str, session: bytes) -> bytes:
        """The other side of `dial`."""
        mine = Hello.fresh(self.instance)
        try:
            theirs = Hello.decode(bytes(await stream.read_exactly(_HELLO_BYTES)))
            await stream.write(mine.encode())
            if theirs.version != PROTOCOL_VERSION:
                await _refuse(stream, "version")
                _fail_version(theirs.version)
            macs = await _read_macs(stream)
            exchange = Exchange(session, peer, self._peer_id, theirs.encode(), mine.encode())
            key = exchange.prover(macs, self._admission.keys(), "dialer")
            if key is None or peer in self._admission.banned:
                failure = self._judge(exchange, macs, peer, has_key=key is not None)
                await _refuse(stream, failure.reason)
                raise failure
            await stream.write(_OK + exchange.mac(key, "listener"))
        except StreamClosed as error:
            raise ProofFailed("protocol", f"it broke off the key proof ({error})") from error
        return theirs.instance

    def _judge(
        self, exchange: Exchange, macs: list[bytes], peer: str, *, has_key: bool
    ) -> ProofFailed:
        """Only who holds a key of this cluster, be it an old one, is told more than "wrong"."""
        had_key = exchange.prover(macs, self._admission.retired(), "dialer") is not None
        if peer in self._admission.banned and (has_key or had_key):
            return ProofFailed("banned", "it was kicked out of the cluster")
        if had_key:
            return ProofFailed("old-key", "it holds a key that was replaced")
        return ProofFailed("wrong-key", "it does not hold this cluster's key")


async def _read_macs(stream: YamuxStream) -> list[bytes]:
    [count] = await stream.read_exactly(1)
    if not 0 < count <= KEYS_LIMIT:
        raise StreamClosed(f"{count} proofs where 1 to {KEYS_LIMIT} are allowed")
    data = bytes(await stream.read_exactly(count * MAC_BYTES))
    return [data[i : i + MAC_BYTES] for i in range(0, len(data), MAC_BYTES)]


def _check_word(word: bytes, theirs: Hello) -> None:
    """Raises `ProofFailed` unless the listener accepted the proof."""
    if word == _OK:
        return
    if word == _REFUSALS["version"]:
        _fail_version(theirs.version)
    for reason, known in _REFUSALS.items():
        if word == known:
            raise ProofFailed(reason, _HEARD[word])
    raise ProofFailed("protocol", "its answer to the key proof makes no sense")


async def _refuse(stream: YamuxStream, reason: str) -> None:
    """Send the word and let the peer close first: closing under unread data would destroy it."""
    with trio.move_on_after(REFUSAL_GRACE), contextlib.suppress(StreamClosed):
        await stream.write(_REFUSALS[reason])
        while await stream.read_some(MAC_BYTES):
            pass


def _fail_version(version: int) -> NoReturn:
    raise ProofFailed(
        "version", f"it speaks version {version} of pxd's protocol, this node {PROTOCOL_VERSION}"
    )
