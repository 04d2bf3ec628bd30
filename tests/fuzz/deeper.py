"""Parsers beyond single messages: handshakes, what is done with a message once it is decoded, files
of a data directory and of a model, and what the commands read."""

import contextlib
import hashlib
import http.client
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from unittest import mock

import mlx.core as mx
import msgspec
import trio
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError

from pxd import hardware, identity, wire
from pxd.api.door import KickBody, PardonBody, RotateBody, parse_body
from pxd.api.errors import ApiError
from pxd.cli.client import Client, StreamFailed, Unreachable
from pxd.cli.client import _refusal as refusal_of
from pxd.cli.find import NoDaemon, NotRunning, read_daemon_file
from pxd.cluster.bans import BanTable
from pxd.cluster.config import MembershipConfig
from pxd.cluster.membership import Membership
from pxd.cluster.messages import Claim, Delta, GossipMessage, News
from pxd.cluster.plans import Plan
from pxd.cluster.records import Device, NodeRecord
from pxd.cluster.signing import Signer, evidence, is_proven, seal, unseal
from pxd.cluster.soundness import flaw
from pxd.cluster.stamps import ceiling
from pxd.doctor.findings import Report
from pxd.executors.mlx.tensors import from_wire
from pxd.executors.protocol import StepRejected
from pxd.executors.rows import check_hidden
from pxd.identity import IdentityError, Keyring, State
from pxd.models.config import ModelConfig
from pxd.models.errors import ModelError
from pxd.p2p.admission import Admission
from pxd.p2p.keyproof import Exchange, Hello, KeyProof, ProofFailed, Role
from pxd.p2p.muxer import StreamClosed
from pxd.p2p.secure import answer, select
from pxd.p2p.tls import Certificate, owner
from pxd.serving.door import DoorState, read_bans
from pxd.serving.status import ClusterStatus
from pxd.wire import DECODE_ERRORS
from tests.fuzz.examples import encoded, example
from tests.fuzz.target import KEY, PEER, Bytes, Target, drive, in_file

_NOW = 1.8e9
HIDDEN = 8


class _Trusting:
    """Takes every signature for genuine, so that nothing behind the check is spared."""

    def sign(self, statement: bytes) -> bytes:
        return hashlib.sha512(statement).digest()

    def verify(self, node: str, statement: bytes, signature: bytes) -> bool:
        return True


def targets() -> Iterator[Target]:
    yield from _handshakes()
    yield from _decoded()
    yield from _files()
    yield from _commands()


def _handshakes() -> Iterator[Target]:
    hello = Hello(b"n" * 32, b"i" * 16)
    said = hello.encode()
    exchange = Exchange(bytes(32), PEER, PEER, said, said)
    mac = exchange.mac(KEY, "dialer")

    def prove(data: bytes, role: Role) -> None:
        proof = KeyProof(Admission(Keyring.first(KEY)), PEER)
        # Else no input would ever be the right answer.
        with mock.patch.object(Hello, "fresh", return_value=hello):
            exchanged = proof.dial if role == "dialer" else proof.listen
            trio.run(exchanged, Bytes(data), PEER, bytes(32))

    yield Target(
        "key proof, dialling",
        lambda data: prove(data, "dialer"),
        (ProofFailed,),
        [said + b"ok......" + exchange.mac(KEY, "listener")],
    )
    yield Target(
        "key proof, listening",
        lambda data: prove(data, "listener"),
        (ProofFailed,),
        [said + b"\x01" + mac, said + b"\x02" + bytes(32) + mac],
    )
    lines = b"\x13/multistream/1.0.0\n"
    yield Target(
        "multistream, answering",
        lambda data: trio.run(answer, ["/a", "/b"], Bytes(data)),
        (MultiselectError,),
        [lines + b"\x03/a\n", lines + b"\x03/c\n\x03/b\n"],
    )
    yield Target(
        "multistream, selecting",
        lambda data: trio.run(select, ["/a", "/b"], Bytes(data)),
        (MultiselectError, MultiselectClientError),
        [lines + b"\x03/a\n", lines + b"\x03na\n\x03/b\n"],
    )
    certificate, other = Certificate(PEER), Certificate(PEER)
    yield Target("certificates", owner, (ValueError,), [certificate.der, other.der])
    yield Target(
        "trusted certificates",
        lambda data: certificate.context([data], server=True),
        (OSError,),
        [certificate.der, other.der],
    )


def _decoded() -> Iterator[Target]:
    signer: Signer = _Trusting()
    record = msgspec.structs.replace(msgspec.convert(example(NodeRecord), NodeRecord), id="a")
    sealed = seal(record, signer)
    yield Target(
        "records",
        lambda data: unseal(msgspec.structs.replace(sealed, content=data)),
        (),
        [sealed.content],
    )
    claim = msgspec.convert(["a", "dead", 1, "b", evidence(sealed)], Claim)
    yield Target(
        "proofs of claims",
        lambda data: is_proven(msgspec.structs.replace(claim, proof=data), signer),
        (),
        [evidence(sealed)],
    )
    gossip = msgspec.msgpack.encode(Delta(news=News((sealed,), (claim,))))
    yield Target(
        "gossip, taken in",
        _Gossip(signer).take,
        DECODE_ERRORS,
        [gossip, *encoded(GossipMessage)],
    )
    yield Target("plans, judged", _judge, DECODE_ERRORS, encoded(Plan))
    yield Target("doors, taken in", _door, DECODE_ERRORS, encoded(DoorState))
    yield Target(
        "hidden states",
        _hidden_states,
        (wire.WireError, StreamClosed, StepRejected),
        [_step(coding) for coding in (None, *get_args(wire.Coding))],
    )


def _step(coding: wire.Coding | None) -> bytes:
    tensor = wire.Tensor("bf16", (3, HIDDEN), coding)
    rows = (wire.Row(1, 0, 2, 0), wire.Row(2, 5, 1, 1))
    step = wire.Step(pipeline="p", session=1, step=1, rows=rows, tensor=tensor)
    return wire.encode(step, tensor.nbytes) + bytes(tensor.nbytes)


def _hidden_states(data: bytes) -> None:
    """What an executor does with a step of the stage before it."""
    step, body = drive(wire.read_frame(Bytes(data).read_exactly, wire.frame_decoder))
    if isinstance(step, wire.Step) and step.rows:
        check_hidden(step, body, HIDDEN)
        array = from_wire(step.tensor, body)
        mx.eval(array)
        if array.shape != (sum(row.count for row in step.rows), HIDDEN):
            raise AssertionError("not one hidden state for each position")


class _Gossip:
    """A node that hears everything there is, one message after the other."""

    def __init__(self, signer: Signer) -> None:
        self._decoder = msgspec.msgpack.Decoder(GossipMessage)
        self._signer = signer
        self._now = 0.0
        self._machine = self._fresh()

    def _fresh(self) -> Membership:
        machine = Membership(
            NodeRecord(id="me", name="me", incarnation=1),
            config=MembershipConfig(),
            signer=self._signer,
            seed=1,
        )
        machine.start(self._now)
        return machine

    def take(self, data: bytes) -> None:
        message = self._decoder.decode(data)
        self._now += 0.5
        self._machine.receive(self._now, "a", message)
        self._machine.tick(self._now)
        for _, sent in self._machine.take_outbox():
            self._decoder.decode(msgspec.msgpack.encode(sent))
        self._machine.take_events()
        self._machine.take_refusals()


def _judge(data: bytes) -> object:
    return flaw(msgspec.msgpack.decode(data, type=Plan))


def _door(data: bytes) -> None:
    state = msgspec.msgpack.decode(data, type=DoorState)
    table = BanTable().merge(state.bans, ceiling(_NOW))
    for banned in (True, False):
        ban = table.next(PEER, banned=banned, by=PEER)
        after = table.merge((ban,), ceiling(_NOW + 1))
        if (PEER in after.banned) is not banned:
            raise AssertionError("a ban that does not count")
    ring = Keyring(key=state.key, generation=state.generation, previous=state.previous)
    if Keyring.first(KEY).accepts(ring):
        ring.keys(_NOW)


def _files() -> Iterator[Target]:
    ring = Keyring.first(KEY).rotated(b"x" * 32, _NOW)
    yield Target(
        "keyring file",
        in_file(lambda path: identity.read_keyring(path, None)),
        (IdentityError,),
        [KEY, msgspec.json.encode(ring)],
    )
    bans = [["a", 1, True, "b", "ann"], ["c", 2, False, "b", ""]]
    yield Target("bans file", in_file(read_bans), (IdentityError,), [json.dumps(bans).encode()])
    state = State(incarnation=3, term=2, choice=(1, "a", "demo"))
    yield Target(
        "state file",
        in_file(identity.read_state),
        (IdentityError,),
        [msgspec.json.encode(state)],
    )
    daemon = {"pid": 1, "http": "http://127.0.0.1:1", "started": 1.5, "token": "t"}
    yield Target(
        "daemon file",
        in_file(lambda path: read_daemon_file(path.parent), "daemon.json"),
        (NoDaemon, NotRunning),
        [json.dumps(daemon).encode()],
    )
    device = {"key": "k", "figures": msgspec.to_builtins(Device())}
    yield Target(
        "hardware file",
        in_file(lambda path: hardware.load_cached(path, "k", Device)),
        (),
        [json.dumps(device).encode()],
    )
    yield Target(
        "model directory's configuration",
        in_file(lambda path: _config(path.parent), "config.json"),
        (ModelError,),
        _configs(),
    )


def _config(directory: Path) -> None:
    config = ModelConfig.read(directory)
    for name, value in vars(ModelConfig).items():
        if isinstance(value, property):
            # Each by itself, so that one refusal does not spare the others.
            with contextlib.suppress(ModelError):
                getattr(config, name)


def _configs() -> list[bytes]:
    path = Path(__file__).parent.parent / "planning/data/model_configs.json"
    entries = json.loads(path.read_text()).values()
    return [json.dumps(e["config"]).encode() for e in entries if isinstance(e, dict)]


def _commands() -> Iterator[Target]:
    for kind in (RotateBody, KickBody, PardonBody):
        yield Target(
            f"body {kind.__name__}",
            lambda data, kind=kind: parse_body(data, kind),
            (ApiError,),
            [msgspec.json.encode(example(kind))],
        )
    client = Client("http://127.0.0.1:1")
    for answered in (ClusterStatus, Report):
        yield Target(
            f"answer {answered.__name__}",
            lambda data, kind=answered: client._parse(data, kind),
            (Unreachable,),
            [msgspec.json.encode(example(answered))],
        )
    error = {"error": {"message": "m", "code": "c"}}
    yield Target("refusals by a daemon", _refusal, (), [json.dumps(error).encode()])
    chunk = {"choices": [{"delta": {"content": "x"}, "index": 0}]}
    lines = b"data: " + json.dumps(chunk).encode() + b"\n\n"
    broken = b"data: " + json.dumps(error).encode() + b"\n\n"
    yield Target(
        "streams of answers",
        _stream,
        (StreamFailed,),
        [lines + lines + b"data: [DONE]\n", b"data: [DONE]\n" + broken],
    )


class _Response(io.BytesIO):
    status = 500
    headers = http.client.HTTPMessage()


def _refusal(data: bytes) -> object:
    return refusal_of(_Response(data), "http://127.0.0.1:1")  # type: ignore[arg-type]


def _stream(data: bytes) -> None:
    @contextlib.contextmanager
    def response(*_: object) -> Iterator[io.BytesIO]:
        yield _Response(data)

    client = Client("http://127.0.0.1:1")
    with mock.patch.object(client, "_response", response):
        for _ in client.chat({}):
            pass
