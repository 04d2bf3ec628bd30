"""What a node signs, so that nobody else can change its record, say goodbye for it, or make it
believe in lives that it never had.

Every signature covers a statement that begins with what kind it is, so that none can be passed off
as another one, nor as anything else that the node's key signs.
"""

import hashlib
from typing import Protocol

import msgspec

from pxd.cluster.messages import MAX_RECORD, Claim, SignedRecord
from pxd.cluster.records import NodeRecord
from pxd.wire import DECODE_ERRORS

_RECORD = b"pxd record 1\n"
_LEFT = b"pxd left 1\n"
_VERSION_BYTES, _DIGEST_BYTES, _SIGNATURE_BYTES = 8, 32, 64
_SHORT = 100

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(NodeRecord)


class Signer(Protocol):
    """This node's key and the public ones of all others."""

    def sign(self, statement: bytes) -> bytes:
        """This node's signature, 64 bytes; the same for the same statement."""

    def verify(self, node: str, statement: bytes, signature: bytes) -> bool:
        """Whether `node` signed `statement`. Never raises, whatever the arguments."""


def seal(record: NodeRecord, signer: Signer) -> SignedRecord:
    """The own record for others. Reasons are cut short and then stages left out if it is too large
    for them; ValueError if even that does not help."""
    content = _encoder.encode(record)
    if len(content) > MAX_RECORD:
        content = _fitted(record)
    signature = signer.sign(_record_statement(record.id, record.order, _digest(content)))
    return SignedRecord(record.id, record.incarnation, record.version, content, signature)


def is_genuine(signed: SignedRecord, signer: Signer) -> bool:
    statement = _record_statement(signed.node, signed.order, _digest(signed.content))
    return signer.verify(signed.node, statement, signed.signature)


def unseal(signed: SignedRecord) -> NodeRecord | None:
    """The record inside; None if it is none, or not the one that stands outside."""
    try:
        record = _decoder.decode(signed.content)
    except DECODE_ERRORS:
        return None
    return record if (record.id, record.order) == (signed.node, signed.order) else None


def goodbye(node: str, incarnation: int, signer: Signer) -> bytes:
    """The proof for the own claim to have left."""
    return signer.sign(_left_statement(node, incarnation))


def evidence(signed: SignedRecord) -> bytes:
    """Proof, without its content, that the node has signed a record of that incarnation."""
    version = signed.version.to_bytes(_VERSION_BYTES)
    return version + _digest(signed.content) + signed.signature


def is_proven(claim: Claim, signer: Signer) -> bool:
    """Whether the node itself has said goodbye, or else has shown the life that it is about."""
    proof = claim.proof
    if claim.state == "left":
        return signer.verify(claim.node, _left_statement(claim.node, claim.incarnation), proof)
    if len(proof) != _VERSION_BYTES + _DIGEST_BYTES + _SIGNATURE_BYTES:
        return False
    version = int.from_bytes(proof[:_VERSION_BYTES])
    digest = proof[_VERSION_BYTES:-_SIGNATURE_BYTES]
    statement = _record_statement(claim.node, (claim.incarnation, version), digest)
    return signer.verify(claim.node, statement, proof[-_SIGNATURE_BYTES:])


def _record_statement(node: str, order: tuple[int, int], digest: bytes) -> bytes:
    return _RECORD + _encoder.encode((node, *order, digest))


def _left_statement(node: str, incarnation: int) -> bytes:
    return _LEFT + _encoder.encode((node, incarnation))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _fitted(record: NodeRecord) -> bytes:
    stages = tuple(
        msgspec.structs.replace(stage, reason=stage.reason[:_SHORT]) for stage in record.stages
    )
    unfit = tuple(
        msgspec.structs.replace(each, reason=each.reason[:_SHORT]) for each in record.unfit
    )
    record = msgspec.structs.replace(
        record, stages=stages, unfit=unfit, problem=record.problem[:_SHORT]
    )
    while len(content := _encoder.encode(record)) > MAX_RECORD:
        if not record.stages:
            raise ValueError(f"a record of {len(content)} bytes, {MAX_RECORD} allowed")
        stages = record.stages[: len(record.stages) // 2]
        record = msgspec.structs.replace(record, stages=stages)
    return content
