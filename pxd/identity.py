"""Who this node is and which cluster it belongs to: keys, tickets, and what survives a restart."""

import base64
import contextlib
import fcntl
import os
import secrets
import tempfile
from pathlib import Path
from typing import Annotated, BinaryIO

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from pxd.wire import DECODE_ERRORS, Count

KEY_BYTES = 32
TICKET_PREFIX = "pxd1"


class IdentityError(Exception):
    """A key, ticket or data directory that cannot be used; the message says what to do."""


class Ticket(msgspec.Struct, frozen=True, array_like=True):
    """What another machine needs to join: the cluster key and multiaddrs of a member."""

    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=512)], ...], msgspec.Meta(max_length=32)
    ]

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


class State(msgspec.Struct, frozen=True, kw_only=True):
    """Counters that must never run backwards, and the model last chosen (stamp, by, name)."""

    incarnation: Count = 0
    term: Count = 0
    choice: tuple[Count, str, str] | None = None


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically, mode 0600, durable before it takes its name."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _read_key(path: Path) -> bytes | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) != KEY_BYTES:
        raise IdentityError(
            f"{path} is damaged ({len(data)} bytes instead of {KEY_BYTES}); "
            "restore it from a backup, or delete it to make a new one"
        )
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


def public_key(seed: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


def node_key_pem(seed: bytes) -> bytes:
    """The node key as unencrypted PKCS#8 PEM, for TLS libraries."""
    key = Ed25519PrivateKey.from_private_bytes(seed)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def cluster_key(path: Path, ticket: Ticket | None) -> bytes:
    """The cluster's shared key, 32 bytes: the ticket's, else the remembered one, else a new one.

    Raises `IdentityError` when the ticket belongs to another cluster than the remembered key.
    """
    if ticket is None:
        return _read_or_make_key(path)
    known = _read_key(path)
    if known is not None and known != ticket.key:
        raise IdentityError(
            f"this node already belongs to another cluster (its key is {path}); "
            "to move it to the ticket's cluster, delete that file, "
            "or use another --data-dir"
        )
    if known is None:
        write_private(path, ticket.key)
    return ticket.key


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
