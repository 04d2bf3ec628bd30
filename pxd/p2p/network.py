"""What the rest of pxd knows of the network: peers, typed calls, frames.

`Network` is the interface; `libp2p` and TLS stay behind it, so that serving and gossip are tested
against an in-memory network. A peer id always comes from the authenticated connection.
"""

from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

import msgspec

from pxd.wire import Buffer, Frame

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")


class NetworkError(Exception):
    """Base of everything a remote peer or the way to it can do to a call."""


class PeerUnreachable(NetworkError):
    """No admitted connection to the peer, and none could be made."""


class CallTimeout(NetworkError):
    """No answer within the deadline; the peer may or may not have acted on the call."""


class CallFailed(NetworkError):
    """The peer answered with an error; `code` is one word for programs."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}" if message else code)
        self.code = code


class Method(Generic[RequestT, ResponseT]):
    """A typed call: its name on the wire and the structs on both sides, at most 4 MiB each.

    Requests of more than `limit` bytes are refused undecoded.
    """

    def __init__(
        self,
        name: str,
        request: type[RequestT],
        response: type[ResponseT],
        *,
        limit: int | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self.request: msgspec.msgpack.Decoder[RequestT] = msgspec.msgpack.Decoder(request)
        self.response: msgspec.msgpack.Decoder[ResponseT] = msgspec.msgpack.Decoder(response)


FrameHandler = Callable[[str, Frame, Buffer], Awaitable[None]]
FrameFilter = Callable[[str, Frame], bool]
PeerHandler = Callable[[str, bool], None]


class Network(Protocol):
    peer_id: str

    def addresses(self) -> tuple[str, ...]:
        """Own multiaddrs, peer id included, that others can be told."""

    def peers(self) -> frozenset[str]:
        """Peers with an admitted connection (they have proved the cluster key)."""

    def learn(self, peer: str, addresses: tuple[str, ...]) -> None:
        """Remember where a peer may be found; used when a call needs a connection."""

    def on_peer(self, handler: PeerHandler) -> None:
        """Call `handler(peer, up)` when an admitted connection appears or is gone."""

    def on_vanished(self, handler: Callable[[str], None]) -> None:
        """Call `handler(peer)` when nobody listens where a peer that is to be reached should be."""

    async def call(
        self,
        peer: str,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float,
    ) -> ResponseT:
        """Raises `PeerUnreachable`, `CallTimeout` or `CallFailed`. A call to oneself is served."""

    def cast(self, peer: str, method: Method[RequestT, None], message: RequestT) -> None:
        """Send without waiting or answer: dropped if it cannot be delivered soon.

        A peer without a connection is dialled in the background and gets the message if that
        succeeds quickly. Never blocks and never raises on network trouble.
        """

    def serve(
        self,
        method: Method[RequestT, ResponseT],
        handler: Callable[[str, RequestT], Awaitable[ResponseT]],
    ) -> None:
        """Answer a call. `CallFailed` raised by the handler reaches the caller as it is."""

    async def send(self, peer: str, frame: Frame, body: Buffer = b"") -> None:
        """Send a frame on the data channel to a peer, opening it first if need be.

        Frames to one peer arrive in the order of the calls. Waits while the peer is slow. Raises
        `PeerUnreachable` when the channel cannot be opened or broke; frames sent before may be
        lost then. A frame to oneself is handed to the handler of `on_frame`.
        """

    def on_frame(self, handler: FrameHandler, wants: FrameFilter = lambda *_: True) -> None:
        """Hand every frame to `handler(peer, frame, body)`; one at a time and in order per peer.

        Before a body is read `wants(peer, frame)` is asked; where it says no, the handler is given
        an empty one.

        While the handler waits, the peer is held back. What it raises closes that channel only.
        """
