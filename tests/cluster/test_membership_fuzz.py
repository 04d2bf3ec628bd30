"""Whatever a member says, nothing breaks, and all that is said in return is sound and bounded."""

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.cluster.messages import (
    LAST_COUNT,
    MAX_MESSAGE,
    Ack,
    Claim,
    Delta,
    Digest,
    DigestEntry,
    GossipMessage,
    Nack,
    News,
    Part,
    Ping,
    PingRequest,
    SignedRecord,
    Summary,
)
from tests.cluster.single import left, member, record
from tests.signers import signed

nodes = st.sampled_from(["me", "a", "b", "bad", "ghost", "\u00e9" * 128])
counts = st.sampled_from([0, 1, 2, 3, LAST_COUNT - 1, LAST_COUNT]) | st.integers(0, LAST_COUNT)
lives = st.integers(0, 4) | st.sampled_from([LAST_COUNT - 1, LAST_COUNT])
proofs = st.binary(max_size=128) | st.builds(lambda n, i: left(n, i).proof, nodes, lives)
forged = st.builds(
    SignedRecord, nodes, counts, counts, st.binary(max_size=40), st.binary(min_size=64, max_size=64)
)
genuine = st.builds(lambda n, i, v: signed(record(n, i, v)), nodes, lives, lives)
claims = st.builds(Claim, nodes, st.sampled_from(["suspect", "dead", "left"]), lives, nodes, proofs)
entries = st.builds(
    DigestEntry,
    nodes,
    st.tuples(lives, lives),
    st.sampled_from(["alive", "suspect", "dead", "left"]),
    lives,
    proofs,
)
news = st.builds(
    News,
    st.lists(forged | genuine, max_size=6).map(tuple),
    st.lists(claims, max_size=6).map(tuple),
)
messages = st.one_of(
    st.builds(Ping, seq=counts, news=news),
    st.builds(Ack, seq=st.integers(0, 9), news=news),
    st.builds(Nack, seq=st.integers(0, 9), news=news),
    st.builds(PingRequest, seq=counts, target=nodes, news=news),
    st.builds(Delta, news=news, wants=st.lists(nodes, max_size=6).map(tuple), answer=st.booleans()),
    st.builds(
        Summary,
        parts=st.lists(
            st.builds(Part, st.none() | nodes, st.binary(min_size=8, max_size=8)),
            min_size=1,
            max_size=6,
        ).map(tuple),
    ),
    st.builds(
        Digest,
        after=st.none() | nodes,
        until=st.none() | nodes,
        entries=st.lists(entries, max_size=6).map(tuple),
    ),
)
steps = st.lists(
    st.tuples(nodes, messages, st.sampled_from([0.0, 0.01, 0.3, 2.0, 70.0])), max_size=12
)
decoder = msgspec.msgpack.Decoder(GossipMessage)


@settings(deadline=None)
@given(steps)
def test_anything_goes(said: list[tuple[str, GossipMessage, float]]) -> None:
    membership = member(record("a"), record("b"))
    now = 0.0
    for peer, message, pause in said:
        now += pause
        membership.receive(now, peer, decoder.decode(msgspec.msgpack.encode(message)))
        for _ in range(200):
            if membership.next_wakeup > now:
                break
            membership.tick(now)
        assert membership.next_wakeup > now, "it comes to rest"
        membership.update(memory=int(now * 1000))
        for _, answer in membership.take_outbox():
            data = msgspec.msgpack.encode(answer)
            assert len(data) <= MAX_MESSAGE
            decoder.decode(data)
        assert membership.members["me"].state == "alive"
        assert membership.take_events() is not None
        assert len(membership.take_refusals()) <= 20
