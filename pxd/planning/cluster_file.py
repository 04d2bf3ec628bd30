"""Reads a cluster file: machines that need not exist, and what lies between them.

`{"nodes": [...], "rtt_ms": {"a": {"b": 1.0}}, "bandwidth_gbps": {"a": {"b": 1.25}},
"water_fill_only": ["a", "b"]}`. Figures of a node are those of one of its GPUs; every gbps is
GB/s (1e9 bytes). A node gives its figures, or names a machine of the catalogue, or both.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec

from pxd.planning.links import Link
from pxd.planning.machines import Machine, find_machine
from pxd.planning.model import NodeOffer

MAX_BYTES = 1 << 20
MAX_NODES = 2000
# A file says 0 where two nodes are one machine, but for a link 0 means not measured.
_SHORTEST_RTT_MS = 1e-6
_LONGEST_RTT_MS = 1e6
_WIDEST = 1e6
_LONGEST_REASON = 200

_T = TypeVar("_T")
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
_Figure = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_Table = dict[str, dict[str, float]]


class Cluster(msgspec.Struct, frozen=True):
    """What the file says. `machines` tells people what each node is.

    `order` is empty, or the nodes that must form one pipeline. `all_mlx` is whether every node is
    of the device "mlx".
    """

    offers: tuple[NodeOffer, ...]
    links: tuple[Link, ...]
    machines: Mapping[str, str]
    order: tuple[str, ...]
    all_mlx: bool


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    id: _Name
    machine: _Name | None = None
    device: _Name | None = None
    num_gpus: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    count: Annotated[int, msgspec.Meta(ge=1, le=MAX_NODES)] | None = None
    tflops_fp16: _Figure | None = None
    memory_gib: _Figure | None = None
    memory_gb: _Figure | None = None
    memory_bandwidth_gbps: _Figure | None = None

    @property
    def ids(self) -> list[str]:
        if self.count is None:
            return [self.id]
        return [f"{self.id}-{number}" for number in range(1, self.count + 1)]


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    nodes: Annotated[list[_Node], msgspec.Meta(min_length=1, max_length=MAX_NODES)]
    rtt_ms: _Table = {}
    bandwidth_gbps: _Table = {}
    water_fill_only: list[_Name] | None = None


def parse_cluster(raw: bytes) -> Cluster:
    """Raises ValueError, in one line that says what is wrong and where in the file."""
    if len(raw) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    file = decode_json(raw, _File)
    if sum(node.count or 1 for node in file.nodes) > MAX_NODES:
        raise ValueError(f"nodes: there are more than {MAX_NODES}")
    offers: dict[str, NodeOffer] = {}
    machines: dict[str, str] = {}
    devices = set()
    for index, node in enumerate(file.nodes):
        where = f"nodes[{index}] ({node.id!r})"
        machine = _machine(node, where)
        devices.add(machine.device)
        for name in node.ids:
            if name in offers:
                raise ValueError(f"{where}: there is another node {name!r}")
            offers[name] = machine.offer(name, node.num_gpus)
            machines[name] = f"{node.num_gpus}x " * (node.num_gpus > 1) + machine.name
    return Cluster(
        offers=tuple(offers.values()),
        links=(*_rtts(file.rtt_ms, offers), *_bandwidths(file.bandwidth_gbps, offers)),
        machines=machines,
        order=_order(file.water_fill_only, offers),
        all_mlx=devices == {"mlx"},
    )


def _machine(node: _Node, where: str) -> Machine:
    """One GPU of the node: the catalogue's figures with the file's own on top."""
    if not node.id.isprintable():
        raise ValueError(f"{where}: an id must be printable")
    if node.memory_gib and node.memory_gb and node.memory_gib != node.memory_gb:
        raise ValueError(f"{where}: memory_gib and memory_gb differ")
    figures = {
        "tflops_fp16": node.tflops_fp16,
        "memory_gib": node.memory_gib or node.memory_gb,
        "memory_bandwidth_gbps": node.memory_bandwidth_gbps,
    }
    if node.machine is not None:
        try:
            known = find_machine(node.machine)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        own = any(figures.values())
        return Machine(
            name=f"{known.name}, changed" if own else known.name,
            device=node.device or known.device,
            tflops=figures["tflops_fp16"] or known.tflops,
            memory_gib=figures["memory_gib"] or known.memory_gib,
            bandwidth=figures["memory_bandwidth_gbps"] or known.bandwidth,
            source=known.source,
        )
    missing = [name for name, figure in figures.items() if not figure]
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing, and so is a machine to take it from")
    tflops, memory, bandwidth = (figure or 0.0 for figure in figures.values())
    device = node.device or ""
    return Machine(f"{device} {memory:g} GiB".strip(), device, tflops, memory, bandwidth, "")


def _rtts(table: _Table, nodes: Mapping[str, NodeOffer]) -> Iterator[Link]:
    for a, b, ms in _pairs("rtt_ms", table, nodes):
        if not 0 <= ms <= _LONGEST_RTT_MS:
            raise ValueError(f"rtt_ms[{a!r}][{b!r}]: {ms:g} ms is no round-trip time")
        yield Link(a, b, rtt=max(ms, _SHORTEST_RTT_MS) / 1e3)


def _bandwidths(table: _Table, nodes: Mapping[str, NodeOffer]) -> Iterator[Link]:
    for a, b, figure in _pairs("bandwidth_gbps", table, nodes):
        if not 0 < figure <= _WIDEST:
            raise ValueError(f"bandwidth_gbps[{a!r}][{b!r}]: {figure:g} GB/s is no bandwidth")
        yield Link(a, b, bandwidth=figure)


def _pairs(
    name: str, table: _Table, nodes: Mapping[str, NodeOffer]
) -> Iterator[tuple[str, str, float]]:
    for a, row in table.items():
        _check_known(name, [a, *row], nodes)
        yield from ((a, b, figure) for b, figure in row.items() if a != b)


def _order(order: Sequence[str] | None, nodes: Mapping[str, NodeOffer]) -> tuple[str, ...]:
    if order is None:
        return ()
    _check_known("water_fill_only", order, nodes)
    if not order or len(set(order)) != len(order):
        raise ValueError("water_fill_only: it must name one or more nodes, each of them once")
    return tuple(order)


def _check_known(where: str, names: Iterable[str], nodes: Mapping[str, NodeOffer]) -> None:
    for name in names:
        if name not in nodes:
            raise ValueError(f"{where}: there is no node {name!r} among the nodes")


def decode_json(raw: bytes, kind: type[_T]) -> _T:
    """Strict JSON as `kind`. Raises ValueError, in one line that says where it went wrong."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        place = where.strip("`.")
        raise ValueError(f"{place}: {_plain(what)}" if place else _plain(what)) from error
    except msgspec.DecodeError as error:
        raise ValueError(f"it is not JSON: {_locate(str(error), raw)}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error


_WORDS = {
    " | null": "",
    "`float`": "a number",
    "`int`": "a whole number",
    "`str`": "a text",
    "`array`": "a list",
    "`object`": "an object",
    "Object contains unknown": "there is no such",
    "Object missing required field": "it lacks the field",
}


def _plain(what: str) -> str:
    """The decoder's words for people; a field's name within them may be anything."""
    for word, plain in _WORDS.items():
        what = what.replace(word, plain)
    what = "".join(c if c.isprintable() else "\ufffd" for c in what[:_LONGEST_REASON])
    return what[0].lower() + what[1:]


def _locate(what: str, raw: bytes) -> str:
    """The decoder's words with line and column in place of a byte number."""
    found = re.search(r"^(?:JSON is malformed: )?(.*) \(byte (\d+)\)$", what)
    if found is None:
        return what[0].lower() + what[1:]
    position = int(found[2])
    line = raw.count(b"\n", 0, position) + 1
    column = position - (raw.rfind(b"\n", 0, position) + 1) + 1
    shown = raw[position : position + 8].split(b"\n")[0].decode(errors="replace")
    return f"{found[1]} at line {line}, column {column}: {shown!r}"
