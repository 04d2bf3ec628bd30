"""Keys are those inside libp2p's peer ids."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.secp256k1 import create_new_key_pair as create_secp256k1
from libp2p.peer.id import ID

from pxd.p2p.signatures import NodeSigner

SEED = b"s" * 32
SIGNER = NodeSigner(SEED)
NODE = ID.from_pubkey(create_new_key_pair(SEED).public_key).to_base58()
SIGNATURE = SIGNER.sign(b"so it is")


def test_a_signature_is_of_one_node_and_one_statement() -> None:
    other = ID.from_pubkey(create_new_key_pair(os.urandom(32)).public_key).to_base58()
    assert len(SIGNATURE) == 64
    assert NodeSigner(b"t" * 32).verify(NODE, b"so it is", SIGNATURE)
    assert not SIGNER.verify(NODE, b"so it is not", SIGNATURE)
    assert not SIGNER.verify(other, b"so it is", SIGNATURE)
    assert not SIGNER.verify(NODE, b"so it is", SIGNATURE[:-1])


@pytest.mark.parametrize(
    "node",
    [
        "",
        "me",
        "0OIl",
        "\u00e9\ud83d" * 9,
        "1" + NODE,
        NODE + " ",
        NODE[:-1],
        "1" * 128,
        "z" * 10_000,
    ],
)
def test_what_is_no_peer_id_signs_nothing(node: str) -> None:
    assert not SIGNER.verify(node, b"so it is", SIGNATURE)


def test_keys_of_other_kinds_sign_nothing() -> None:
    node = ID.from_pubkey(create_secp256k1().public_key).to_base58()
    assert not SIGNER.verify(node, b"so it is", SIGNATURE)


@given(st.binary(max_size=60), st.binary(max_size=80))
def test_nothing_raises(inside: bytes, signature: bytes) -> None:
    assert not SIGNER.verify(ID(inside).to_base58(), b"so it is", signature)
