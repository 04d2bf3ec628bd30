"""The key proof: only the same key, the same two peers and the same exchange are accepted."""

import contextlib
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from hypothesis import assume, given
from hypothesis import strategies as st

from pxd.identity import Keyring
from pxd.p2p import keyproof
from pxd.p2p.admission import Admission
from pxd.p2p.keyproof import Exchange, KeyProof, ProofFailed
from pxd.p2p.muxer import StreamClosed, YamuxStream
from tests.p2p.test_muxer import Ends

KEY, OTHER_KEY = b"k" * 32, b"x" * 32
SESSION = b"s" * 32
KEYS = st.binary(min_size=32, max_size=32)
HELLOS = st.binary(min_size=50, max_size=50)
PEERS = st.text(min_size=1, max_size=60)
ROLES: st.SearchStrategy[keyproof.Role] = st.sampled_from(["dialer", "listener"])
Parts = tuple[bytes, keyproof.Role, bytes, str, str, bytes, bytes]
EXCHANGES = st.tuples(KEYS, ROLES, KEYS, PEERS, PEERS, HELLOS, HELLOS)


def proof(parts: Parts) -> bytes:
    key, role, *bound = parts
    return Exchange(*bound).mac(key, role)  # type: ignore[arg-type]


def prover(key: bytes, peer: str, *others: bytes) -> KeyProof:
    """Of a node that holds `key`, and `others` as the keys before it."""
    ring = Keyring.first(others[0] if others else key)
    if others:
        ring = ring.rotated(key, until=1000.0)
    return KeyProof(Admission(ring, clock=lambda: 500.0), peer)


@given(EXCHANGES, EXCHANGES)
def test_a_proof_is_good_for_its_own_exchange_only(one: Parts, other: Parts) -> None:
    assume(one != other)
    assert proof(one) == proof(one)
    assert proof(one) != proof(other)


@given(EXCHANGES, st.integers(0, 6), EXCHANGES)
def test_changing_any_one_part_makes_another_proof(
    exchange: Parts, part: int, other: Parts
) -> None:
    assume(exchange[part] != other[part])
    changed = (*exchange[:part], other[part], *exchange[part + 1 :])
    assert proof(exchange) != proof(changed)  # type: ignore[arg-type]


@given(PEERS, PEERS, HELLOS)
def test_parts_cannot_be_shifted_into_each_other(a: str, b: str, hello: bytes) -> None:
    assume(b)
    one = Exchange(SESSION, a + b, "", hello, hello)
    assert one.mac(KEY, "dialer") != Exchange(SESSION, a, b, hello, hello).mac(KEY, "dialer")


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


async def prove(ends: Ends, a: KeyProof, b: KeyProof) -> list[object]:
    """The honest exchange, as peers "a" and "b" would see it."""
    return await exchange(
        ends, lambda s: a.dial(s, "b", SESSION), lambda s: b.listen(s, "a", SESSION)
    )


@pytest.fixture
async def ends(nursery: trio.Nursery) -> Ends:
    return Ends(nursery)


async def test_holders_of_the_key_learn_each_other_s_instance(ends: Ends) -> None:
    a, b = prover(KEY, "a"), prover(KEY, "b")
    assert await prove(ends, a, b) == [b.instance, a.instance]


async def test_another_key_is_refused_on_both_sides(ends: Ends) -> None:
    outcomes = await prove(ends, prover(KEY, "a"), prover(OTHER_KEY, "b"))
    assert outcomes == ["wrong-key", "wrong-key"]


async def test_a_listener_without_the_key_cannot_pretend(ends: Ends) -> None:
    """It says that all is well and sends back what it got: the dialer's own MAC, then noise."""
    a = prover(KEY, "a")
    for reflect in (True, False):

        async def pretend(stream: YamuxStream, reflect: bool = reflect) -> bytes:
            await stream.read_exactly(50)
            await stream.write(keyproof.Hello.fresh(bytes(16)).encode())
            mac = bytes(await stream.read_exactly(33))[1:]
            await stream.write(b"ok......" + (mac if reflect else bytes(32)))
            return b""

        outcomes = await exchange(ends, lambda s: a.dial(s, "b", SESSION), pretend)
        assert outcomes[0] == "wrong-key"


async def test_a_listener_s_proof_cannot_be_sent_back_to_it(ends: Ends) -> None:
    """The attacker has the listener prove in one exchange and uses that in another one."""
    b, hello = prover(KEY, "b"), keyproof.Hello.fresh(bytes(16)).encode()
    exchanges = []

    async def reflect(stream: YamuxStream) -> bytes:
        await stream.write(hello)
        theirs = bytes(await stream.read_exactly(50))
        exchanges.append(Exchange(SESSION, "a", "b", hello, theirs))
        await stream.write(b"\x01" + exchanges[-1].mac(KEY, "listener"))
        return bytes(await stream.read_exactly(8))

    outcomes = await exchange(ends, reflect, lambda s: b.listen(s, "a", SESSION))
    assert outcomes == [b"wrongkey", "wrong-key"]


@pytest.mark.parametrize(
    ("peer", "session"), [("mallory", SESSION), ("a", b"t" * 32)], ids=["peer", "session"]
)
async def test_a_proof_for_another_peer_or_session_is_refused(
    ends: Ends, peer: str, session: bytes
) -> None:
    a, b = prover(KEY, "a"), prover(KEY, "b")
    outcomes = await exchange(
        ends, lambda s: a.dial(s, "b", SESSION), lambda s: b.listen(s, peer, session)
    )
    assert outcomes == ["wrong-key", "wrong-key"]


@pytest.mark.parametrize(
    ("dialer", "listener"),
    [
        ((OTHER_KEY, KEY), (KEY,)),
        ((KEY,), (OTHER_KEY, KEY)),
        ((OTHER_KEY, KEY), (OTHER_KEY, KEY)),
        ((OTHER_KEY, KEY), (b"y" * 32, KEY)),
    ],
    ids=["new to old", "old to new", "both new", "two rotations at once"],
)
async def test_members_around_a_rotation_have_one_key_in_common(
    ends: Ends, dialer: tuple[bytes, ...], listener: tuple[bytes, ...]
) -> None:
    a, b = prover(dialer[0], "a", *dialer[1:]), prover(listener[0], "b", *listener[1:])
    assert await prove(ends, a, b) == [b.instance, a.instance]


async def test_a_replaced_key_is_refused_by_name_once_its_time_is_over(ends: Ends) -> None:
    ring = Keyring.first(KEY).rotated(OTHER_KEY, until=1000.0)
    late = KeyProof(Admission(ring, clock=lambda: 1000.0), "b")
    assert await prove(ends, prover(KEY, "a"), late) == ["old-key", "old-key"]
    # Who never had a key of this cluster is not told that it has another one now.
    assert await prove(ends, prover(b"y" * 32, "a"), late) == ["wrong-key", "wrong-key"]
    # A dialer no longer offers it either.
    late_dialer = KeyProof(Admission(ring, clock=lambda: 1000.0), "a")
    assert await prove(ends, late_dialer, prover(KEY, "b")) == ["wrong-key", "wrong-key"]


async def test_a_banned_peer_is_refused_by_name_if_it_has_the_key(ends: Ends) -> None:
    b = prover(KEY, "b")
    b._admission.banned = frozenset({"a"})
    assert await prove(ends, prover(KEY, "a"), b) == ["banned", "banned"]
    assert await prove(ends, prover(OTHER_KEY, "a"), b) == ["wrong-key", "wrong-key"]
    # The usual case: the key was replaced after the peer was kicked.
    b._admission.ring = Keyring.first(KEY).rotated(OTHER_KEY, until=0.0)
    assert await prove(ends, prover(KEY, "a"), b) == ["banned", "banned"]


async def test_a_banned_peer_is_not_dialled(ends: Ends) -> None:
    a = prover(KEY, "a")
    a._admission.banned = frozenset({"b"})
    here, _ = await ends.stream()
    sent = len(ends.pipe_a.sent)
    with pytest.raises(ProofFailed) as failure:
        await a.dial(here, "b", SESSION)
    assert failure.value.reason == "banned"
    assert len(ends.pipe_a.sent) == sent


@pytest.mark.parametrize("version", [1, 999])
async def test_another_version_is_refused_by_name(ends: Ends, version: int) -> None:
    """Whichever side is the other one; versions before 2 sent one MAC and nothing before it."""
    a, b = prover(KEY, "a"), prover(KEY, "b")
    hello = keyproof.Hello(bytes(32), bytes(16), version).encode()

    async def dial_as_other(stream: YamuxStream) -> bytes:
        await stream.write(hello)
        await stream.read_exactly(50)
        await stream.write(bytes(32))
        return bytes(await stream.read_exactly(8))

    async def listen_as_other(stream: YamuxStream) -> bytes:
        await stream.read_exactly(50)
        await stream.write(hello)
        return bytes(await stream.read_exactly(32))

    outcomes = await exchange(ends, dial_as_other, lambda s: b.listen(s, "a", SESSION))
    assert outcomes == [b"version.", "version"]
    outcomes = await exchange(ends, lambda s: a.dial(s, "b", SESSION), listen_as_other)
    assert outcomes == ["version", bytes(32)]


@pytest.mark.parametrize("count", [0, 3, 255])
async def test_the_number_of_proofs_is_bounded(ends: Ends, count: int) -> None:
    b = prover(KEY, "b")

    async def guess(stream: YamuxStream) -> bytes:
        await stream.write(keyproof.Hello.fresh(bytes(16)).encode())
        await stream.read_exactly(50)
        await stream.write(bytes([count]) + bytes(32 * count))
        return b""

    outcomes = await exchange(ends, guess, lambda s: b.listen(s, "a", SESSION))
    assert outcomes[1] == "protocol"


async def test_a_stranger_hears_nothing_but_a_nonce_and_a_refusal(ends: Ends) -> None:
    b = prover(KEY, "b")
    heard = bytearray()

    async def guess(stream: YamuxStream) -> bytes:
        await stream.write(keyproof.Hello.fresh(bytes(16)).encode())
        heard.extend(await stream.read_exactly(50))
        await stream.write(b"\x01" + bytes(32))
        with contextlib.suppress(StreamClosed):
            while data := await stream.read_some(100):
                heard.extend(data)
                stream.finish()
        return b""

    outcomes = await exchange(ends, guess, lambda s: b.listen(s, "stranger", SESSION))
    assert outcomes[1] == "wrong-key"
    assert heard[50:] == b"wrongkey"
    # The nonce differs every time, so a recorded exchange cannot be replayed.
    first = heard[:32]
    heard.clear()
    await exchange(ends, guess, lambda s: b.listen(s, "stranger", SESSION))
    assert heard[:32] != first


async def test_a_recorded_proof_cannot_be_replayed(ends: Ends) -> None:
    b = prover(KEY, "b")
    mine = keyproof.Hello.fresh(bytes(16)).encode()
    recorded: list[bytes] = []

    async def honest(stream: YamuxStream) -> bytes:
        await stream.write(mine)
        theirs = bytes(await stream.read_exactly(50))
        recorded.append(b"\x01" + Exchange(SESSION, "a", "b", mine, theirs).mac(KEY, "dialer"))
        await stream.write(recorded[0])
        return bytes(await stream.read_exactly(8))

    async def replay(stream: YamuxStream) -> bytes:
        await stream.write(mine)
        await stream.read_exactly(50)
        await stream.write(recorded[0])
        word = bytes(await stream.read_exactly(8))
        stream.reset()
        return word

    def listen(stream: YamuxStream) -> Awaitable[bytes]:
        return b.listen(stream, "a", SESSION)

    assert (await exchange(ends, honest, listen))[0] == b"ok......"
    assert await exchange(ends, replay, listen) == [b"wrongkey", "wrong-key"]


async def test_garbage_is_a_failed_proof_and_nothing_else(ends: Ends) -> None:
    a, b = prover(KEY, "a"), prover(KEY, "b", OTHER_KEY)
    rng = random.Random(11)
    hello = keyproof.Hello.fresh(bytes(16)).encode()

    async def babble(stream: YamuxStream) -> bytes:
        beginning = rng.choice([b"", hello, hello + b"\x01", hello + b"\x02", hello + b"ok......"])
        with contextlib.suppress(StreamClosed):
            await stream.write(beginning + rng.randbytes(rng.randrange(1, 200)))
            stream.finish()
        return b""

    reasons = set()
    for _ in range(300):
        [_, listener] = await exchange(ends, babble, lambda s: b.listen(s, "a", SESSION))
        [dialer, _] = await exchange(ends, lambda s: a.dial(s, "b", SESSION), babble)
        reasons |= {listener, dialer}
    assert reasons == {"protocol", "version", "wrong-key"}
