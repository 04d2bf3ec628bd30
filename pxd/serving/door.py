"""The door of the cluster: every member holds the same keys and the same list of banned peers.

Like plans they are pushed by whoever changes them and pulled by whoever finds, in a member's
record, a digest that is not its own. Bans always travel with the keys and take effect first, so
that no member passes a new key on to somebody whom it has not yet heard to be banned.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import msgspec
import trio

from pxd import identity
from pxd.cluster.allowance import Allowance
from pxd.cluster.bans import Ban, BanList, BanTable
from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.stamps import ceiling
from pxd.identity import ClusterId, IdentityError, Key, Keyring
from pxd.p2p.network import CallFailed, Method, Network, NetworkError
from pxd.serving.doorview import Kick, NodeRef, Rotation, Told
from pxd.serving.names import resolve
from pxd.serving.readiness import Members
from pxd.settings import DataFiles
from pxd.wire import DECODE_ERRORS, Count

log = logging.getLogger("pxd.serving.door")

PUSH_TIMEOUT_S = 5.0
PULL_RETRY_S = 1.0
MAX_GRACE_S = 30 * 86400.0
CHANGES_PER_S, CHANGES_AT_ONCE = 0.5, 20.0
"""How often one member may make this node store other keys or bans by pushing them."""
NAMED = 8
"""Peers named in the log of one change."""

_LIVE = ("alive", "suspect")


class DoorError(Exception):
    """The keys or bans cannot be changed like that; `code` is one word, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class DoorState(msgspec.Struct, frozen=True):
    """All that a member says of its door. `grace` in seconds from now, as clocks differ."""

    key: Key
    generation: Count
    cluster: ClusterId
    previous: Key | None
    grace: Annotated[float, msgspec.Meta(ge=0, le=MAX_GRACE_S)]
    bans: BanList


PUSH: Method[DoorState, str] = Method("door.push", DoorState, str)
PULL: Method[None, DoorState] = Method("door.pull", type(None), DoorState)

Changed = Callable[[Keyring, frozenset[str]], Awaitable[None]]


class Door:
    """Works while `run` runs. `changed` is awaited with the keys and the banned peers after each
    change, once that is stored; when it returns, the change must be in force."""

    def __init__(
        self,
        network: Network,
        members: Callable[[], Members],
        files: DataFiles,
        ring: Keyring,
        bans: BanTable,
        changed: Changed,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._network = network
        self._members = members
        self._files = files
        self._ring = ring
        self._bans = bans
        self._changed = changed
        self._clock = clock
        self._changing = trio.Lock()
        self._acting = trio.Lock()
        self._behind = trio.Event()
        self._compared: dict[str, tuple[str, str]] = {}
        self._allowances: dict[str, Allowance] = {}
        self._tried: dict[str, int] = {}
        self._stored = True
        network.serve(PUSH, self._serve_push)
        network.serve(PULL, self._serve_pull)

    @property
    def ring(self) -> Keyring:
        return self._ring

    @property
    def bans(self) -> BanTable:
        return self._bans

    @property
    def digest(self) -> str:
        """Equal exactly where keys and bans are; tells neither."""
        ring = self._ring.generation.to_bytes(6, "big") + self._ring.digest
        return hashlib.sha256(b"pxd door 1" + ring + self._bans.digest).hexdigest()[:32]

    async def rotate(self, grace: float) -> Rotation:
        """Replace the cluster key; the present one counts for `grace` more seconds.

        Raises `DoorError` when the new key cannot be stored; nothing has changed then.
        """
        if not 0 <= grace <= MAX_GRACE_S:
            most = f"{MAX_GRACE_S / 86400:.0f} days"
            raise DoorError("bad_grace", f"a grace period is between 0 and {most}")
        async with self._acting:
            return await self._rotate(grace)

    async def kick(self, wanted: str, *, rotate: bool = False) -> Kick:
        """Ban the node that a person calls `wanted`. Raises `DoorError`."""
        async with self._acting:
            node = self._resolve(wanted, self._known())
            if node.id == self._network.peer_id:
                message = "a node cannot kick itself; `pxd stop` makes it leave the cluster"
                raise DoorError("own_node", message)
            if self._bans.is_full and node.id not in self._bans.banned:
                message = "the list of banned nodes is full; `pxd kick --undo` some of them"
                raise DoorError("full", message)
            told = await self._decide(node, banned=True)
            rotation = await self._rotate_after(node) if rotate else None
        return Kick(node=node, banned=True, told=told, stored=self._stored, rotation=rotation)

    def banned(self) -> list[Ban]:
        """Those who are kept out, the latest first."""
        bans = (ban for ban in self._bans.entries if ban.banned)
        return sorted(bans, key=lambda ban: ban.order, reverse=True)

    async def pardon(self, wanted: str) -> Kick:
        """Let a banned node in again. Raises `DoorError`."""
        async with self._acting:
            banned = {ban.peer: ban.name for ban in self._bans.entries if ban.banned}
            node = self._resolve(wanted, banned, known_only=True)
            told = await self._decide(node, banned=False)
        return Kick(node=node, banned=False, told=told, stored=self._stored)

    def follow(self) -> None:
        """Look at the records anew: does anybody hold other keys or bans?"""
        if self._source() is not None:
            self._behind.set()

    async def run(self) -> None:
        """Pull whenever a member's record shows a door that differs from this one."""
        while True:
            await self._behind.wait()
            self._behind = trio.Event()
            source = self._source()
            if source is None:
                continue
            peer, theirs = source
            level = logging.DEBUG if peer in self._tried else logging.INFO
            self._tried[peer] = 1 + max(self._tried.values(), default=0)
            try:
                state = await self._network.call(peer, PULL, None, timeout=PUSH_TIMEOUT_S)
                whole = await self._take(peer, state)
            except (NetworkError, OSError) as error:
                log.log(level, "could not take keys and bans from %s yet: %s", peer, error)
                whole = False
            if whole:
                # If they still differ, the peer lacks something and will ask for it.
                self._compared[peer] = (theirs, self.digest)
                del self._tried[peer]
            else:
                await trio.sleep(PULL_RETRY_S)
            self.follow()

    def _resolve(self, wanted: str, known: dict[str, str], *, known_only: bool = False) -> NodeRef:
        try:
            return resolve(wanted, known, known_only=known_only)
        except LookupError as error:
            raise DoorError("unknown_node", str(error)) from error

    def _known(self) -> dict[str, str]:
        """Names by peer id, of members and of those that were banned before."""
        names = {ban.peer: ban.name for ban in self._bans.entries}
        return names | {peer: member.record.name for peer, member in self._members().items()}

    async def _rotate_after(self, banned: NodeRef) -> Rotation:
        try:
            return await self._rotate(0.0)
        except DoorError as error:
            name = banned.name or banned.id
            message = f"{name} is banned, but the key was not replaced: {error}"
            raise DoorError(error.code, message) from error

    async def _rotate(self, grace: float) -> Rotation:
        if grace == 0:
            # While the old key counts, so that all who can be connected are when it no longer does.
            await self._publish()
        superseded = self._ring.grace(self._clock()) > 0
        ring = self._ring.rotated(secrets.token_bytes(identity.KEY_BYTES), self._clock() + grace)
        # Whoever stops waiting, or this node as it stops, must not leave a key behind that is
        # stored here and that nobody else has heard of. All of it takes some seconds at most.
        with trio.CancelScope(shield=True):
            try:
                async with self._changing:
                    await self._use(ring)
            except OSError as error:
                message = f"cannot store the new key: {error.strerror or error}; the old one stays"
                raise DoorError("storage", message) from error
            told = await self._publish()
        return Rotation(generation=ring.generation, grace=grace, told=told, superseded=superseded)

    async def _decide(self, node: NodeRef, *, banned: bool) -> Told:
        ban = self._bans.next(node.id, banned=banned, by=self._network.peer_id, name=node.name)
        async with self._changing:
            await self._learn((ban,), self._network.peer_id)
        return await self._publish()

    async def _publish(self) -> Told:
        """Tell all members; those not reached will ask once they see this node's record."""
        told = Told(confirmed=[], unconfirmed=[])
        state = self._state()
        async with trio.open_nursery() as nursery:
            for peer, member in sorted(self._members().items()):
                node = NodeRef(id=peer, name=member.record.name)
                if peer == self._network.peer_id or member.state == "left":
                    continue
                if member.state in _LIVE:
                    nursery.start_soon(self._push, node, state, told)
                else:
                    told.unconfirmed.append(node)
        told.confirmed.sort(key=NodeRef.by_name)
        told.unconfirmed.sort(key=NodeRef.by_name)
        return told

    async def _push(self, node: NodeRef, state: DoorState, told: Told) -> None:
        try:
            held = await self._network.call(node.id, PUSH, state, timeout=PUSH_TIMEOUT_S)
        except NetworkError as error:
            log.warning("%s (%s) has not confirmed a change of the door: %s", *node.both, error)
            told.unconfirmed.append(node)
            return
        told.confirmed.append(node)
        if held != self.digest:
            self._behind.set()

    async def _serve_push(self, peer: str, state: DoorState) -> str:
        self._check(peer)
        now, before = trio.current_time(), self.digest
        allowance = self._allowance(peer)
        if not allowance.has(now):
            raise CallFailed("too-often", "keys and bans change too often on the word of this node")
        try:
            await self._take(peer, state)
            if self.digest != before:
                allowance.take(now)
        except OSError as error:
            log.error("cannot store a new cluster key, so it is not used: %s", error)
            raise CallFailed("storage", "cannot store the key") from error
        return self.digest

    async def _serve_pull(self, peer: str, _request: None) -> DoorState:
        self._check(peer)
        return self._state()

    def _allowance(self, peer: str) -> Allowance:
        for gone in self._allowances.keys() - self._members().keys():
            del self._allowances[gone]
        return self._allowances.setdefault(peer, Allowance(CHANGES_PER_S, CHANGES_AT_ONCE))

    def _check(self, peer: str) -> None:
        """Calls that were on their way when the peer was banned are not answered any more."""
        if peer in self._bans.banned:
            raise CallFailed("banned", "this node was kicked out of the cluster")

    def _state(self) -> DoorState:
        ring, now = self._ring, self._clock()
        grace = min(ring.grace(now), MAX_GRACE_S)
        return DoorState(
            key=ring.key,
            generation=ring.generation,
            cluster=ring.cluster,
            previous=ring.previous,
            grace=grace,
            bans=self._bans.entries,
        )

    async def _take(self, peer: str, state: DoorState) -> bool:
        """Says whether all of it was looked at: what is ahead of its time has to be asked for
        again. Raises OSError when a new key cannot be stored."""
        most = ceiling(self._clock())
        ring = Keyring(
            key=state.key,
            generation=state.generation,
            cluster=state.cluster,
            previous=state.previous,
            previous_until=self._clock() + state.grace,
        )
        async with self._changing:
            await self._learn(state.bans, peer, most)
            self._check(peer)
            if ring.generation <= most and self._ring.accepts(ring):
                await self._use(ring)
                log.warning("the cluster key was replaced, on the word of %s", peer)
        return max((ring.generation, *(ban.stamp for ban in state.bans))) <= most

    async def _learn(self, bans: tuple[Ban, ...], source: str, most: int = LAST_COUNT) -> None:
        merged = self._bans.merge(bans, most)
        if merged != self._bans:
            # What this node says that it knows has to be in force.
            with trio.CancelScope(shield=True):
                before, self._bans = self._bans.banned, merged
                await self._store(merged)
                self._log_change(before, source)
                await self._changed(self._ring, merged.banned)

    async def _store(self, bans: BanTable) -> None:
        write = partial(write_bans, self._files.bans, bans)
        try:
            await trio.to_thread.run_sync(write)
            self._stored = True
        except OSError as error:
            self._stored = False
            # A ban that is forgotten at the next start beats one that never takes effect.
            log.error("cannot store the list of banned nodes: %s", error)

    def _log_change(self, before: frozenset[str], source: str) -> None:
        banned = self._bans.banned
        for peers, now in (
            (banned - before, "banned"),
            (before - banned, "no longer banned"),
        ):
            if peers:
                named = ", ".join(_called(self._bans, peer) for peer in sorted(peers)[:NAMED])
                more = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
                log.warning("%s, on the word of %s: %s%s", now, source, named, more)
        if self._network.peer_id in banned - before:
            log.warning("this node was kicked out of the cluster")

    async def _use(self, ring: Keyring) -> None:
        write = partial(identity.write_keyring, self._files.cluster_key, ring)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(write)
            self._ring = ring
            await self._changed(self._ring, self._bans.banned)

    def _source(self) -> tuple[str, str] | None:
        """A member whose door differs in a way that was not looked into yet, and its digest."""
        own, members = self.digest, self._members()
        for known in (self._compared, self._tried):
            for peer in known.keys() - members.keys():
                del known[peer]
        # Whom it failed with last comes last, lest it keeps this node from the others.
        differing = [
            (self._tried.get(peer, 0), peer, member.record.door)
            for peer, member in members.items()
            if member.state in _LIVE
            and member.record.door not in ("", own)
            and self._compared.get(peer) != (member.record.door, own)
        ]
        return min(differing)[1:] if differing else None


def _called(bans: BanTable, peer: str) -> str:
    ban = bans.get(peer)
    return f"{ban.name} ({peer})" if ban and ban.name else peer


def read_bans(path: Path) -> BanTable:
    """Raises `IdentityError` for a damaged file: letting banned nodes in would be worse."""
    try:
        return BanTable(msgspec.json.decode(path.read_bytes(), type=BanList))
    except FileNotFoundError:
        return BanTable()
    except DECODE_ERRORS as error:
        raise IdentityError(
            f"{path} is damaged ({error}); delete it, the other members tell this node again "
            "whom they banned"
        ) from error


def write_bans(path: Path, bans: BanTable) -> None:
    identity.write_private(path, msgspec.json.format(msgspec.json.encode(bans.entries)))
