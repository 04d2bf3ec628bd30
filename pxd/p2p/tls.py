"""TLS 1.3 between peers that know each other's certificate already: self-signed, pinned, mutual."""

import datetime
import ssl
import tempfile

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

CERTIFICATE_LIMIT = 4096

# A pinned certificate needs no lifetime of its own, and clocks of a cluster may differ.
_NOT_BEFORE = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_NOT_AFTER = datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)


class Certificate:
    """A key and its certificate, made for one life of this process and never stored."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        serial = x509.random_serial_number()
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"pxd {serial:x}")])
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
            context.load_verify_locations(cadata=certificate)
        return context
