"""The key proof: only the same key, the same two peers and the same exchange are accepted."""

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import assume, given
from hypothesis import strategies as st

from pxd.p2p import keyproof
from pxd.p2p.keyproof import KeyProof, ProofFailed, is_proof, proof
from pxd.p2p.muxer import StreamClosed, YamuxStream
from tests.p2p.test_muxer import Ends

KEYS = st.binary(min_size=32, max_size=32)
HELLOS = st.binary(min_size=50, max_size=50)
PEERS = st.text(min_size=1, max_size=60)
ROLES: st.SearchStrategy[keyproof.Role] = st.sampled_from(["dialer", "listener"])
EXCHANGES = st.tuples(KEYS, ROLES, PEERS, PEERS, HELLOS, HELLOS)


@given(EXCHANGES, EXCHANGES)
def test_a_proof_is_good_for_its_own_exchange_only(
    one: tuple[bytes, keyproof.Role, str, str, bytes, bytes],
    other: tuple[bytes, keyproof.Role, str, str, bytes, bytes],
) -> None:
    assume(one != other)
    assert is_proof(proof(*one), proof(*one))
    assert not is_proof(proof(*one), proof(*other))


@given(EXCHANGES, st.integers(0, 5), EXCHANGES)
def test_changing_any_one_part_makes_another_proof(
    exchange: tuple[bytes, keyproof.Role, str, str, bytes, bytes],
    part: int,
    other: tuple[bytes, keyproof.Role, str, str, bytes, bytes],
) -> None:
    assume(exchange[part] != other[part])
    changed = (*exchange[:part], other[part], *exchange[part + 1 :])
    assert not is_proof(proof(*exchange), proof(*changed))  # type: ignore[arg-type]


@given(PEERS, PEERS, HELLOS)
def test_parts_cannot_be_shifted_into_each_other(a: str, b: str, hello: bytes) -> None:
    assume(b)
    key = bytes(32)
    assert proof(key, "dialer", a + b, "", hello, hello) != proof(key, "dialer", a, b, hello, hello)


async def exchange(
    ends: Ends,
    dial: Callable[[YamuxStream], Awaitable[bytes]],
    listen: Callable[[YamuxStream], Awaitable[bytes]],
) -> list[object]:
    """Run both sides; returns what each returned or raised, the dialer's first."""
    here, there = await ends.stream()
    outcomes: list[object] = [None, None]

    async def run(side: int, act: Callable[[YamuxStream], Awaitable[bytes]]) -> None:
        stream = (here, there)[side]
        try:
            outcomes[side] = await act(stream)
        except ProofFailed as error:
            outcomes[side] = error.reason
            stream.reset()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, 0, dial)
            nursery.start_soon(run, 1, listen)
    return outcomes


@pytest.fixture
async def ends(nursery: trio.Nursery) -> Ends:
    return Ends(nursery)


async def test_holders_of_the_key_learn_each_other_s_instance(ends: Ends) -> None:
    a, b = KeyProof(b"k" * 32, "a"), KeyProof(b"k" * 32, "b")
    outcomes = await exchange(ends, lambda s: a.dial(s, "b"), lambda s: b.listen(s, "a"))
    assert outcomes == [b.instance, a.instance]


async def test_another_key_is_refused_on_both_sides(ends: Ends) -> None:
    a, b = KeyProof(b"k" * 32, "a"), KeyProof(b"x" * 32, "b")
    outcomes = await exchange(ends, lambda s: a.dial(s, "b"), lambda s: b.listen(s, "a"))
    assert outcomes == ["wrong-key", "wrong-key"]


async def test_a_proof_for_another_peer_is_refused(ends: Ends) -> None:
    a, b = KeyProof(b"k" * 32, "a"), KeyProof(b"k" * 32, "b")
    outcomes = await exchange(ends, lambda s: a.dial(s, "b"), lambda s: b.listen(s, "mallory"))
    assert outcomes == ["wrong-key", "wrong-key"]


async def test_another_version_is_refused_by_name(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = KeyProof(b"k" * 32, "a"), KeyProof(b"k" * 32, "b")

    async def dial_as_newer(stream: YamuxStream) -> bytes:
        fresh = keyproof.Hello.fresh
        hello = fresh(a.instance)
        hello.version = 999
        monkeypatch.setattr(keyproof.Hello, "fresh", lambda instance: hello)
        try:
            return await a.dial(stream, "b")
        finally:
            monkeypatch.setattr(keyproof.Hello, "fresh", fresh)

    outcomes = await exchange(ends, dial_as_newer, lambda s: b.listen(s, "a"))
    assert outcomes == ["version", "version"]


async def test_a_stranger_hears_nothing_but_a_nonce_and_a_refusal(ends: Ends) -> None:
    b = KeyProof(b"k" * 32, "b")
    heard = bytearray()

    async def guess(stream: YamuxStream) -> bytes:
        await stream.write(keyproof.Hello.fresh(bytes(16)).encode())
        heard.extend(await stream.read_exactly(50))
        await stream.write(bytes(32))
        with contextlib.suppress(StreamClosed):
            while data := await stream.read_some(100):
                heard.extend(data)
                stream.finish()
        return b""

    outcomes = await exchange(ends, guess, lambda s: b.listen(s, "stranger"))
    assert outcomes[1] == "wrong-key"
    assert heard[50:] == b"wrongkey"
    # The nonce differs every time, so a recorded exchange cannot be replayed.
    first = heard[:32]
    heard.clear()
    await exchange(ends, guess, lambda s: b.listen(s, "stranger"))
    assert heard[:32] != first


async def test_a_recorded_proof_cannot_be_replayed(ends: Ends) -> None:
    key = b"k" * 32
    b = KeyProof(key, "b")
    mine = keyproof.Hello.fresh(bytes(16)).encode()
    recorded: list[bytes] = []

    async def honest(stream: YamuxStream) -> bytes:
        await stream.write(mine)
        theirs = bytes(await stream.read_exactly(50))
        recorded.append(proof(key, "dialer", "a", "b", mine, theirs))
        await stream.write(recorded[0])
        return bytes(await stream.read_exactly(8))

    async def replay(stream: YamuxStream) -> bytes:
        await stream.write(mine)
        await stream.read_exactly(50)
        await stream.write(recorded[0])
        word = bytes(await stream.read_exactly(8))
        stream.reset()
        return word

    assert (await exchange(ends, honest, lambda s: b.listen(s, "a")))[0] == b"ok......"
    assert await exchange(ends, replay, lambda s: b.listen(s, "a")) == [b"wrongkey", "wrong-key"]
