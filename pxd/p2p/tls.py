"""TLS 1.3 between peers that know each other's certificate already: self-signed, pinned, mutual."""

import datetime
import os
import socket
import ssl
import tempfile
from contextlib import suppress
from typing import cast

import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from pxd.p2p.framestreams import COALESCE
from pxd.p2p.muxer import StreamClosed
from pxd.wire import Buffer

CERTIFICATE_LIMIT = 4096
CHUNK = 256 * 1024
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}

# A pinned certificate needs no lifetime of its own, and clocks of a cluster may differ.
_NOT_BEFORE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


class Certificate:
    """A key and its certificate, made for one life of this process and never stored.

    It names the peer, so that nobody else can announce it as its own; see `owner`.
    """

    def __init__(self, peer: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        # The name must differ between two lives: OpenSSL looks issuers up by it.
        attributes = [(NameOID.COMMON_NAME, peer), (NameOID.SERIAL_NUMBER, f"{serial:x}")]
        name = x509.Name([x509.NameAttribute(oid, value) for oid, value in attributes])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(serial)
            .not_valid_before(_NOT_BEFORE)
            .not_valid_after(_NOT_AFTER)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(key, SHA256())
        )
        self.der = certificate.public_bytes(Encoding.DER)
        self._pem = key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ) + certificate.public_bytes(Encoding.PEM)

    def context(self, trusted: list[bytes], *, server: bool) -> ssl.SSLContext:
        """Accepts a peer with one of the `trusted` DER certificates and nobody else.

        Raises `ssl.SSLError` when one of them is not a certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if server:
            context.num_tickets = 0
        # The ssl module reads a key from a file only; this one exists for a moment, mode 0600.
        with tempfile.NamedTemporaryFile() as file:
            file.write(self._pem)
            file.flush()
            context.load_cert_chain(file.name)
        for certificate in trusted:
            try:
                context.load_verify_locations(cadata=certificate)
            except ValueError as error:
                raise ssl.SSLError(f"not a certificate: {error}") from error
        return context


def owner(certificate: bytes) -> str:
    """The peer that a DER certificate names. Raises ValueError where it names none."""
    try:
        subject = x509.load_der_x509_certificate(certificate).subject
        [name] = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        return str(name.value)
    except Exception as error:
        # Names are parsed late, and what fails there has many types.
        raise ValueError(f"not a certificate of a peer: {error}") from error


class TlsStream:
    """TLS over a TCP stream, reading straight into the buffer that is returned.

    Like `trio.SSLStream`, but without its trip through the scheduler for every record of 16 KiB,
    which costs more than the encryption. One task reads, one writes; both raise `StreamClosed`
    at the end, and leave the stream at an unknown place when cancelled: close it then.
    """

    def __init__(
        self, transport: trio.SocketStream, context: ssl.SSLContext, *, server: bool
    ) -> None:
        self._transport = transport
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._unsent = b""
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server)
        _set_options(transport)

    async def handshake(self) -> bytes:
        """Returns the peer's certificate (DER). Raises `ssl.SSLError` or `StreamClosed`."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                await self._flush()
                raise
            else:
                await self._flush()
                return self._tls.getpeercert(binary_form=True) or b""

    async def write(self, *parts: Buffer) -> None:
        """All parts, one after the other; small ones leave together."""
        waiting = 0
        for part in parts:
            view = memoryview(part)
            while len(view):
                written = self._tls.write(view[:CHUNK])
                view = view[written:]
                waiting += written
                if waiting >= CHUNK:
                    await self._flush()
                    waiting = 0
        await self._flush()

    def write_now(self, *parts: Buffer) -> bool:
        """Write small parts without waiting, while nothing else is written; False if nothing was.

        What the socket does not take at once is `unsent`, and sent by the next `write`.
        """
        if self._unsent or sum(map(len, parts)) > COALESCE:
            return False
        try:
            self._tls.write(b"".join(parts))
        except ssl.SSLError:
            return False
        self._unsent = self._outgoing.read()
        # That the connection is broken is for the next `write` to say.
        with suppress(OSError):
            sent = os.write(self._transport.socket.fileno(), self._unsent)
            self._unsent = self._unsent[sent:]
        return True

    @property
    def unsent(self) -> bool:
        return bool(self._unsent)

    async def read_exactly(self, count: int) -> bytearray:
        data = bytearray(count)
        view = memoryview(data)
        while len(view):
            try:
                read = cast(int, self._tls.read(len(view), view))
            except ssl.SSLWantReadError:
                await self._fill()
            except ssl.SSLError as error:
                raise StreamClosed(str(error)) from error
            else:
                if not read:
                    raise StreamClosed("the peer closed the connection")
                view = view[read:]
        return data

    def close(self) -> None:
        """Now, whatever is blocked on it."""
        self._transport.socket.close()

    async def _fill(self) -> None:
        try:
            data = await self._transport.receive_some(CHUNK)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosed(str(error)) from error
        if not data:
            raise StreamClosed("the peer closed the connection")
        self._incoming.write(data)

    async def _flush(self) -> None:
        data, self._unsent = self._unsent + self._outgoing.read(), b""
        try:
            await self._transport.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosed(str(error)) from error


def _set_options(transport: trio.SocketStream) -> None:
    transport.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    transport.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            transport.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
