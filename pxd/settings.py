"""Everything a person can set for one daemon, and where it keeps its files."""

import socket
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

DEFAULT_HTTP = "127.0.0.1:8470"
DEFAULT_LISTEN = "*:8471"
DEFAULT_MODEL = "demo"
DEFAULT_REQUEST_TIMEOUT_S = 3600.0
DEFAULT_LEAVE_TIMEOUT_S = 20.0

MAX_RANKS = 64

WireDtype = Literal["native", "fp8", "int8", "auto"]
ExecutorChoice = Literal["auto", "mlx", "torch", "sglang"]


def default_data_dir() -> Path:
    return Path(platformdirs.user_data_dir("pxd", appauthor=False))


def default_name() -> str:
    return socket.gethostname().split(".")[0][:64] or "node"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon's settings. Units: `memory`, `kv_tier` GiB; `request_timeout` and
    `leave_timeout` seconds.

    `http` and `listen` are HOST:PORT; None means the default port, or any free one if it is taken.
    `relay`: pass traffic on for members that cannot reach each other. The host `*` of `listen`
    stands for all addresses, IPv4 and IPv6. `admission` is explained at
    `pxd.engine.continuous.ContinuousConfig`, and holds for the pipelines that this node heads.
    `speculate`: guess tokens ahead in pipelines that begin here. `wire_dtype` is for what this node
    sends; all nodes take everything. `tensor_parallel` is over how many GPUs of this machine each
    stage is spread. `leave_timeout` is for how long others are waited for that are to take over,
    before this node leaves.
    """

    data_dir: Path
    name: str
    model: str | None = None
    join: str | None = None
    http: str | None = None
    listen: str | None = None
    memory: float | None = None
    max_layers: int | None = None
    kv_tier: float | None = None
    request_timeout: float = DEFAULT_REQUEST_TIMEOUT_S
    leave_timeout: float = DEFAULT_LEAVE_TIMEOUT_S
    admission: Literal["reserve", "preempt"] = "preempt"
    speculate: Literal["auto", "on", "off"] = "auto"
    wire_dtype: WireDtype = "native"
    executor: ExecutorChoice = "auto"
    tensor_parallel: int = 1
    priority: int = 0
    mdns: bool = True
    relay: bool = False
    log_format: Literal["text", "json"] = "text"

    @property
    def kv_tier_bytes(self) -> int:
        return int((self.kv_tier or 0) * (1 << 30))

    @property
    def files(self) -> "DataFiles":
        return DataFiles(self.data_dir)


class DataFiles:
    """Names of the files in a data directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.node_key = root / "node.key"
        self.cluster_key = root / "cluster.key"
        self.bans = root / "bans.json"
        self.state = root / "state.json"
        self.peers = root / "peers.json"
        self.hardware = root / "hardware.json"
        self.lock = root / "daemon.lock"
        self.daemon = root / "daemon.json"
        self.cache = root / "cache"
        self.scratch = root / "scratch"


def parse_endpoint(value: str) -> tuple[str, int]:
    """Split HOST:PORT; IPv6 hosts stand in brackets. Raises ValueError with a helpful message."""
    host, separator, port = value.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{value!r} is not HOST:PORT, for example 127.0.0.1:8470 or [::1]:8470")
    return host, int(port)
