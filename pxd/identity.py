"""Who this node is and which cluster it belongs to: keys, tickets, and what survives a restart."""

import base64
import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec

from pxd.wire import DECODE_ERRORS, Count

log = logging.getLogger("pxd.identity")

KEY_BYTES = 32
TICKET_PREFIX = "pxd1"
CLUSTER_BYTES = 8

Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
ClusterId = Annotated[bytes, msgspec.Meta(max_length=CLUSTER_BYTES)]


class IdentityError(Exception):
    """A key, ticket or data directory that cannot be used; the message says what to do."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What another machine needs to join: the cluster key and multiaddrs of a member.

    `cluster` and `generation` are the keyring's, so that a member of old can tell that the key is a
    later one of its own cluster; tickets of older releases lack them.
    """

    key: Key
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=512)], ...], msgspec.Meta(max_length=32)
    ]
    cluster: ClusterId = b""
    generation: Count = 0

    def __str__(self) -> str:
        data = base64.urlsafe_b64encode(msgspec.msgpack.encode(self)).rstrip(b"=")
        return TICKET_PREFIX + data.decode()

    @classmethod
    def parse(cls, text: str) -> "Ticket":
        """Raises `IdentityError` for anything that `str(ticket)` did not make."""
        text = text.strip()
        data = text.removeprefix(TICKET_PREFIX)
        try:
            if data == text:
                raise ValueError(f"it does not start with {TICKET_PREFIX}")
            raw = base64.b64decode(data + "=" * (-len(data) % 4), altchars=b"-_", validate=True)
            return msgspec.msgpack.decode(raw, type=cls)
        except (ValueError, *DECODE_ERRORS) as error:
            raise IdentityError(
                f"this is not a pxd ticket ({error}); "
                "copy the whole line that `pxd ticket` prints on a member"
            ) from error


class Keyring(msgspec.Struct, frozen=True, kw_only=True):
    """The cluster key, and the one before it while that still opens the door.

    Of two keyrings the one with the greater (`generation`, digest of the key) wins everywhere, so
    that two rotations at once end with one key. `cluster` stays the same through all rotations.
    `previous` counts until `previous_until`, in seconds since the epoch on this machine.
    """

    key: Key
    generation: Count = 0
    cluster: ClusterId = b""
    previous: Key | None = None
    previous_until: float = 0.0

    @classmethod
    def first(cls, key: bytes) -> "Keyring":
        """That of a cluster whose key was never replaced."""
        digest = hashlib.sha256(b"pxd cluster id 1" + key).digest()
        return cls(key=key, cluster=digest[:CLUSTER_BYTES])

    @property
    def order(self) -> tuple[int, bytes]:
        return self.generation, self.digest

    @property
    def digest(self) -> bytes:
        """Tells keys apart without telling them."""
        return hashlib.sha256(b"pxd cluster key digest 1" + self.key).digest()

    def keys(self, now: float) -> tuple[bytes, ...]:
        """Those that open the door, the current one first."""
        if self.previous is not None and self.grace(now) > 0:
            return self.key, self.previous
        return (self.key,)

    def retired(self, now: float) -> tuple[bytes, ...]:
        """Those that opened it once, as far as they are remembered."""
        return (self.previous,) if self.previous is not None and self.grace(now) <= 0 else ()

    def grace(self, now: float) -> float:
        """Seconds for which the previous key still counts."""
        return max(0.0, self.previous_until - now) if self.previous is not None else 0.0

    def rotated(self, key: bytes, until: float) -> "Keyring":
        """The next keyring, with `key`; the present key counts up to the time `until`."""
        return Keyring(
            key=key,
            generation=self.generation + 1,
            cluster=self.cluster,
            previous=self.key,
            previous_until=until,
        )

    def accepts(self, other: "Keyring") -> bool:
        """Whether `other`, as another member holds it, is to replace this one."""
        return other.order > self.order


Models = tuple[Count, str, tuple[str, ...], tuple[str, ...]]
"""Models chosen: stamp, by whom, their names, and those that they replace."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Counters that must never run backwards, and what people decided while the node ran.

    `choice` (stamp, by, name) is how releases with one model wrote what is in `models` now. `added`
    are models that are to be had on this node, `quantized` those of them that are made here: of
    which model, and with how many bits.
    """

    incarnation: Count = 0
    term: Count = 0
    choice: tuple[Count, str, str] | None = None
    models: Models | None = None
    drained: bool = False
    added: tuple[str, ...] = ()
    quantized: dict[str, tuple[str, int]] = {}


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically, mode 0600; durable when this returns, where directories can be
    synchronised."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems cannot, and by now the file has its name.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_key(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != KEY_BYTES:
        raise _damaged(path, f"{len(data)} bytes instead of {KEY_BYTES}")
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    return data


def _read_or_make_key(path: Path) -> bytes:
    key = _read_key(path)
    if key is None:
        key = secrets.token_bytes(KEY_BYTES)
        write_private(path, key)
    return key


def prepare_data_dir(root: Path) -> None:
    """Create the data directory, for its owner alone. Raises `IdentityError` if that fails."""
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise IdentityError(
            f"cannot use the data directory {root}: {error.strerror or error}; "
            "choose another one with --data-dir"
        ) from error


def lock_data_dir(path: Path) -> BinaryIO:
    """Hold the returned file open for as long as the daemon runs.

    Raises `IdentityError` when another daemon holds it: two daemons must not share an identity.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise IdentityError(
            f"a pxd daemon already runs with the data directory {path.parent}; "
            "see `pxd status`, stop it with `pxd stop`, "
            "or start a second node with its own --data-dir DIR"
        ) from error
    return file


def node_key(path: Path) -> bytes:
    """The seed of this node's Ed25519 key, 32 bytes; made at first use."""
    return _read_or_make_key(path)


def read_keyring(path: Path, ticket: Ticket | None, *, alone: bool = False) -> Keyring:
    """The keys of the cluster: the ticket's, else the remembered ones, else a new one's.

    A ticket with a later key of the cluster that this node knows replaces the remembered key, one
    with an earlier key does not. Raises `IdentityError` when it belongs to another cluster, unless
    it has always been `alone` in that one.
    """
    known = _known_keyring(path)
    if ticket is None:
        ring = known or Keyring.first(secrets.token_bytes(KEY_BYTES))
    elif known is None:
        ring = _keyring_of(ticket)
    elif ticket.key in (known.key, known.previous):
        ring = known
    elif ticket.cluster and ticket.cluster == known.cluster:
        ring = _keyring_of(ticket) if ticket.generation >= known.generation else known
        if ring is known:
            log.warning(
                "the ticket has an earlier key of this cluster (number %d) than this node (number "
                "%d) and does not replace it; if the other members go on with the earlier one, "
                "stop this node, delete %s and start it with the ticket again",
                ticket.generation + 1,
                known.generation + 1,
                path,
            )
    elif alone:
        ring = _keyring_of(ticket)
    else:
        raise IdentityError(
            f"this node already belongs to another cluster (its key is {path}); "
            "to move it to the ticket's cluster, delete that file, "
            "or use another --data-dir"
        )
    if ring != known:
        write_keyring(path, ring)
    return ring


def write_keyring(path: Path, ring: Keyring) -> None:
    """A key that was never replaced is stored bare, as releases before keyrings did."""
    bare = ring == Keyring.first(ring.key)
    write_private(path, ring.key if bare else msgspec.json.format(msgspec.json.encode(ring)))


def _keyring_of(ticket: Ticket) -> Keyring:
    first = Keyring.first(ticket.key)
    cluster = ticket.cluster or first.cluster
    return msgspec.structs.replace(first, cluster=cluster, generation=ticket.generation)


def _known_keyring(path: Path) -> Keyring | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if path.stat().st_mode & 0o077:
        path.chmod(0o600)
    if len(data) == KEY_BYTES:
        return Keyring.first(data)
    try:
        return msgspec.json.decode(data, type=Keyring)
    except DECODE_ERRORS as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, what: str) -> IdentityError:
    return IdentityError(
        f"{path} is damaged ({what}); restore it from a backup, or delete it to make a new one"
    )


def read_state(path: Path) -> State:
    """Raises `IdentityError` for a damaged file: running counters backwards would be worse."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=State)
    except FileNotFoundError:
        return State()
    except DECODE_ERRORS as error:
        raise IdentityError(f"{path} is damaged ({error}); delete it to start afresh") from error


def write_state(path: Path, state: State) -> None:
    write_private(path, msgspec.json.format(msgspec.json.encode(state)))
