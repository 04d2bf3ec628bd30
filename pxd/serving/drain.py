"""Drained nodes: each decides for itself, when a member asks it, and remembers across restarts."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec
import trio

from pxd.cluster.allowance import Allowance
from pxd.cluster.records import NodeRecord
from pxd.p2p.network import CallFailed, Method, Network, NetworkError
from pxd.serving.doorview import NodeRef
from pxd.serving.names import resolve
from pxd.serving.readiness import Members

log = logging.getLogger("pxd.serving.drain")

ASK_TIMEOUT_S = 5.0
CHANGES_PER_S, CHANGES_AT_ONCE = 0.5, 20.0
"""How often members may make this node write to its disk."""


class DrainError(Exception):
    """A node cannot be drained or resumed; `code` is one word, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Drain(msgspec.Struct, frozen=True):
    """Whether a node is drained: it takes no part in plans, but stays a member."""

    drained: bool


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. `changed` unless the node was so before."""

    node: NodeRef
    drained: bool
    changed: bool


DRAIN: Method[Drain, Drain] = Method("node.drain", Drain, Drain)
"""Answers what was before."""


class Records(Protocol):
    @property
    def record(self) -> NodeRecord: ...
    def update(self, **changes: Any) -> None: ...


class Drains:
    """This node's part in it. `save` writes fields of `identity.State`; `forgive` has it take part
    again in plans of models at which it kept failing."""

    def __init__(
        self,
        network: Network,
        members: Callable[[], Members],
        records: Records,
        save: Callable[..., Awaitable[None]],
        forgive: Callable[[], None] = lambda: None,
    ) -> None:
        self._network = network
        self._members = members
        self._records = records
        self._save = save
        self._forgive = forgive
        self._allowance = Allowance(CHANGES_PER_S, CHANGES_AT_ONCE)
        network.serve(DRAIN, self._serve)

    async def set(self, wanted: str, *, drained: bool) -> Drained:
        """Drain or resume the member that a person calls `wanted`. Raises `DrainError`."""
        members = self._members()
        try:
            node = resolve(
                wanted, {peer: m.record.name for peer, m in members.items()}, known_only=True
            )
        except LookupError as error:
            raise DrainError("unknown_node", str(error)) from error
        try:
            before = await self._ask(node.id, Drain(drained))
        except NetworkError as error:
            member = members.get(node.id)
            state = member.state if member else "gone"
            message = f"{node.name or node.id} ({state}) was asked and did not do it: {error}"
            raise DrainError("unreachable", message) from error
        except OSError as error:
            message = f"this node cannot write that down: {error.strerror or error}"
            raise DrainError("storage", message) from error
        return Drained(node=node, drained=drained, changed=before.drained != drained)

    async def _ask(self, node: str, request: Drain) -> Drain:
        if node == self._network.peer_id:
            return await self._take(request)
        return await self._network.call(node, DRAIN, request, timeout=ASK_TIMEOUT_S)

    async def _serve(self, peer: str, request: Drain) -> Drain:
        now = trio.current_time()
        if request != self._before(request):
            if not self._allowance.take(now):
                raise CallFailed("too-often", "it was drained and resumed too often just now")
            log.warning("this node is %s, on the word of %s", _word(request), peer)
        try:
            return await self._take(request)
        except OSError as error:
            log.error("cannot write down whether this node is drained: %s", error)
            raise CallFailed("storage", "it cannot write that to its disk") from error

    async def _take(self, request: Drain) -> Drain:
        before = self._before(request)
        await self._save(drained=request.drained)
        self._records.update(drained=request.drained)
        if not request.drained:
            self._forgive()
        return before

    def _before(self, request: Drain) -> Drain:
        """A node that left a model to others by itself is resumed like one that was drained."""
        record = self._records.record
        return Drain(record.drained or (not request.drained and record.unfit != ()))


def _word(request: Drain) -> str:
    return "drained" if request.drained else "no longer drained"
