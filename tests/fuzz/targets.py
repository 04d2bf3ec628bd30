"""Every parser of bytes that others chose, with what it may raise for them."""

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.utils.varint import encode_varint_prefixed
from zeroconf import ServiceInfo

import pxd.p2p
import pxd.serving
from pxd import wire
from pxd.api.chat_request import parse_chat_request
from pxd.executors.messages import Command, Reply, command_decoder, reply_decoder
from pxd.identity import IdentityError, Ticket
from pxd.models.errors import ModelError
from pxd.models.safetensors import read_header
from pxd.p2p import circuit, mdns, observed, punch, rpc
from pxd.p2p.addressbook import AddressBook, RememberedPeer
from pxd.p2p.addresses import parse_address
from pxd.p2p.muxer import ProtocolViolation, StreamClosed, Yamux
from pxd.p2p.network import CallFailed, Method
from pxd.p2p.secure import BoundedCommunicator
from pxd.p2p.services import Services, decode_response
from pxd.planning.cluster_file import parse_cluster
from pxd.planning.cost.config import cost_from_config
from pxd.serving.requests import InvalidRequest
from pxd.settings import parse_endpoint
from tests.fuzz import deeper
from tests.fuzz.examples import encoded
from tests.fuzz.target import KEY, PEER, Bytes, Target, drive, in_file

DATA = Path(__file__).parent.parent


def methods() -> dict[str, Method[Any, Any]]:
    """All calls that nodes make, wherever they are defined."""
    found = {}
    for package in (pxd.p2p, pxd.serving):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(module.name)).values():
                if isinstance(value, Method):
                    found[value.name] = value
    return found


def _calls() -> Iterator[Target]:
    async def serve(_peer: str, _request: object) -> None:
        return None

    for name, method in methods().items():
        services = Services()
        services.add(method, serve)
        yield Target(
            f"request {name}",
            lambda data, name=name, services=services: drive(services.answer(PEER, name, data)),
            (CallFailed,),
            encoded(method.request.type),
        )
        yield Target(
            f"response {name}",
            lambda data, method=method: decode_response(method, data),
            (CallFailed,),
            encoded(method.response.type),
        )


def _rpc(decoder: Any) -> Callable[[bytes], object]:
    return lambda data: drive(rpc.read_message(Bytes(data), decoder))  # type: ignore[arg-type]


def _frames(decoder: Any) -> Callable[[bytes], object]:
    def parse(data: bytes) -> object:
        return drive(wire.read_frame(Bytes(data).read_exactly, decoder))

    return parse


def _headers() -> Iterator[Target]:
    """The headers by themselves, so that changed values get past the lengths before them."""
    for name, kind, decoder in (
        ("frame headers", wire.Frame, wire.frame_decoder),
        ("command headers", Command, command_decoder),
        ("reply headers", Reply, reply_decoder),
    ):
        yield Target(
            name,
            lambda data, decoder=decoder: wire.decode_header(data, _body(data, decoder), decoder),
            (wire.WireError,),
            encoded(kind),
        )
    for name, kind, decoder in (
        ("rpc request bodies", _REQUESTS, rpc._requests),
        ("rpc answer bodies", _ANSWERS, rpc._answers),
    ):
        yield Target(
            name,
            lambda data, decoder=decoder: drive(
                rpc.read_message(Bytes(rpc._LENGTH.pack(len(data)) + data), decoder)  # type: ignore[arg-type]
            ),
            (StreamClosed,),
            encoded(kind),
        )


def _body(data: bytes, decoder: Any) -> int:
    """The length of the body that a header asks for."""
    try:
        return _size(decoder.decode(data))
    except wire.DECODE_ERRORS:
        return 0


def _size(header: Any) -> int:
    tensor = getattr(header, "tensor", None)
    return tensor.nbytes if tensor is not None else getattr(header, "size", 0)


def _framed(kind: Any) -> list[bytes]:
    frames = []
    for header in encoded(kind):
        size = _size(msgspec.msgpack.decode(header, type=kind))
        frames.append(wire._PREFIX.pack(len(header), size) + header + bytes(size))
    return frames


class _Secured:
    def abort(self) -> None:
        pass

    async def read(self) -> bytes:
        raise NotImplementedError

    async def write(self, data: bytes) -> None:
        raise NotImplementedError


def _mux(data: bytes) -> None:
    muxer = Yamux(_Secured(), initiator=False)
    muxer._on_stream = lambda _stream: None
    muxer._buffer += data
    muxer._parse()


_MUX = [
    bytes.fromhex("000100010000000100000000000000000000000100000005") + b"hello",
    bytes.fromhex("000200010000000000000007000300000000000000000000"),
    bytes.fromhex("000100010000000300000000000100000000000300010000000100040000000300000000"),
]


def _multistream(data: bytes) -> object:
    return drive(BoundedCommunicator(Bytes(data)).read())


def _circuit(kind: Callable[[], Any], use: Callable[[Any], object]) -> Callable[[bytes], object]:
    return lambda data: use(drive(circuit.read_message(Bytes(data), kind)))  # type: ignore[arg-type]


_ENDPOINTS = [observed.encode_endpoint((host, 8471)) for host in ("192.0.2.7", "2001:db8::1")]
_CIRCUIT_MESSAGES = {
    "hop": HopMessage(
        type=HopMessage.CONNECT, peer=circuit.peer_message(PEER), status=Status.NO_RESERVATION
    ),
    "stop": StopMessage(type=StopMessage.CONNECT, peer=circuit.peer_message(PEER)),
    "hole punching": HolePunch(type=HolePunch.CONNECT, ObsAddrs=_ENDPOINTS),
    "identify": Identify(observed_addr=_ENDPOINTS[0], agent_version="x"),
}


def _circuits() -> Iterator[Target]:
    """Messages about circuits, and what is taken from each."""
    uses: dict[str, Callable[[Any], object]] = {
        "hop": lambda message: (circuit.peer_in(message.peer), message.status),
        "stop": lambda message: circuit.peer_in(message.peer),
        "hole punching": punch.endpoints_in,
        "identify": lambda message: observed.decode_endpoint(message.observed_addr),
    }
    for name, message in _CIRCUIT_MESSAGES.items():
        packed = encode_varint_prefixed(message.SerializeToString())
        refusals = (StreamClosed, ValueError) if name == "identify" else (StreamClosed,)
        yield Target(name, _circuit(type(message), uses[name]), refusals, [packed])


def _announcement(data: bytes) -> object:
    properties = {b"id": data[:60].rstrip(b"\0"), b"badge": data[60:76]}
    if data[:1] == b"+":
        peer = data[1:60].rstrip(b"\0").decode("utf-8", "ignore")
        properties = {b"id": peer.encode(), b"badge": mdns.badge(KEY, peer).encode()}
    info = ServiceInfo(
        mdns.SERVICE,
        f"x.{mdns.SERVICE}",
        port=int.from_bytes(data[76:78], "big"),
        addresses=[data[78:82].ljust(4, b"\0"), data[82:98].ljust(16, b"\0")],
        properties=properties,
    )
    return mdns.read_announcement(info, KEY)


def _book(path: Path) -> None:
    AddressBook(path).load()


def _config(data: bytes) -> object:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return cost_from_config(value)


def _configs() -> list[bytes]:
    configs = json.loads((DATA / "planning/data/model_configs.json").read_text())
    found = (entry["config"] for entry in configs.values() if isinstance(entry, dict))
    return [json.dumps(config).encode() for config in found]


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "replace"))


def _address(text: str) -> None:
    address = parse_address(text)
    # What the system's resolver does first with a name, and what it refuses to hear of.
    try:
        address.host.encode("idna")
    except UnicodeError as error:
        raise AssertionError("no name to look up") from error
    if "\0" in address.host:
        raise AssertionError("a name with a null character")


def _safetensors() -> bytes:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]},
    }
    data = json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data + bytes(16)


_CHAT = {
    "model": "demo",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ],
    "temperature": 0.5,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True},
    "seed": -1,
    "max_tokens": 5,
    "min_tokens": 1,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": -0.5,
    "logit_bias": {"5": -100, "17": 2.5},
    "logprobs": True,
    "top_logprobs": 2,
    "stop_token_ids": [7],
    "response_format": {"type": "text"},
}
_CLUSTER = {
    "nodes": [
        {"id": "a", "machine": "rtx-4090", "memory_gib": 16},
        {"id": "b", "tflops_fp16": 10, "memory_gb": 24, "memory_bandwidth_gbps": 100},
    ],
    "rtt_ms": {"a": {"b": 1.5}},
    "bandwidth_gbps": {"a": {"b": 1.0}},
}
_ADDRESSES = [
    f"/ip4/192.0.2.7/tcp/8471/p2p/{PEER}".encode(),
    f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}".encode(),
    f"/dns4/example.org/tcp/65535/p2p/{PEER}".encode(),
]


def all_targets() -> list[Target]:
    """In a fixed order."""
    ticket = str(Ticket(KEY, (f"/ip4/192.0.2.7/tcp/8471/p2p/{PEER}",)))
    remembered = [RememberedPeer(PEER, (_ADDRESSES[0].decode(),), 2e9)]
    packed = [rpc.pack(msgspec.msgpack.decode(data)) for data in encoded(_REQUESTS)]
    answers = [rpc.pack(msgspec.msgpack.decode(data)) for data in encoded(_ANSWERS)]
    return [
        *_calls(),
        *_headers(),
        *deeper.targets(),
        Target("rpc requests", _rpc(rpc._requests), (StreamClosed,), packed),
        Target("rpc answers", _rpc(rpc._answers), (StreamClosed,), answers),
        Target(
            "frames",
            _frames(wire.frame_decoder),
            (wire.WireError, StreamClosed),
            _framed(wire.Frame),
        ),
        Target(
            "commands", _frames(command_decoder), (wire.WireError, StreamClosed), _framed(Command)
        ),
        Target("replies", _frames(reply_decoder), (wire.WireError, StreamClosed), _framed(Reply)),
        Target("yamux", _mux, (ProtocolViolation,), _MUX),
        Target(
            "multistream",
            _multistream,
            (MultiselectCommunicatorError,),
            [b"\x13/multistream/1.0.0\n", b"\x03na\n"],
        ),
        Target(
            "mdns",
            _announcement,
            (ValueError,),
            [
                (id_ + bytes(60))[:60] + bytes(16) + b"\x21\x17" + bytes(range(20))
                for id_ in (PEER.encode(), b"+" + PEER.encode())
            ],
        ),
        *_circuits(),
        Target("addresses", _text(_address), (ValueError,), _ADDRESSES),
        Target(
            "addresses through a relay",
            _text(circuit.split_circuit),
            (ValueError,),
            [_ADDRESSES[0] + b"/p2p-circuit/p2p/" + PEER[::-1].encode()],
        ),
        Target("endpoints", _text(parse_endpoint), (ValueError,), [b"127.0.0.1:80", b"[::1]:8470"]),
        Target("tickets", _text(Ticket.parse), (IdentityError,), [ticket.encode()]),
        Target("remembered peers", in_file(_book), (), [msgspec.json.encode(remembered)]),
        Target("safetensors", in_file(read_header), (ModelError,), [_safetensors()]),
        Target("model configurations", _config, (ValueError, RecursionError), _configs()),
        Target("cluster files", parse_cluster, (ValueError,), [json.dumps(_CLUSTER).encode()]),
        Target(
            "chat requests", parse_chat_request, (InvalidRequest,), [json.dumps(_CHAT).encode()]
        ),
    ]


_REQUESTS = rpc.Request | rpc.Cast | rpc.Abandon
_ANSWERS = rpc.Answer | rpc.Failure
