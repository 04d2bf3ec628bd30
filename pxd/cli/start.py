"""`pxd start`: run a daemon in the foreground until it is stopped."""

import math
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from pxd.cli.find import data_dir_of_environment
from pxd.cli.options import fail, with_examples
from pxd.settings import (
    DEFAULT_HTTP,
    DEFAULT_LEAVE_TIMEOUT_S,
    DEFAULT_LISTEN,
    DEFAULT_MODEL,
    DEFAULT_REQUEST_TIMEOUT_S,
    MAX_RANKS,
    ExecutorChoice,
    Settings,
    WireDtype,
    default_name,
    parse_endpoint,
)
from pxd.wire import MAX_TIMEOUT_S

MAX_LEAVE_TIMEOUT_S = 3600.0

HELP = with_examples(
    "Run a node here, in the foreground, until Ctrl-C or `pxd stop`. "
    "Keys and the cluster are remembered: from the second time on, `pxd start` is enough.",
    ("pxd start", "a new cluster, or the one it knows"),
    ("pxd start --join TICKET", "the cluster of that ticket"),
    ("pxd start --model Qwen/Qwen3-8B", "and have it serve this model"),
    ("pxd start --memory 8", "offer at most 8 GiB"),
)


class Speculate(Enum):
    auto = "auto"
    on = "on"
    off = "off"


class LogFormat(Enum):
    text = "text"
    json = "json"


class Admission(Enum):
    reserve = "reserve"
    preempt = "preempt"


def _option(flag: str, metavar: str, help: str, env: str | None = None) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        flag, metavar=metavar, help=help, envvar=env, show_default=False
    )
    return option


Model = Annotated[
    str | None,
    _option(
        "--model",
        "M",
        f"What the cluster is to serve: a bundled model ({DEFAULT_MODEL}), a directory, "
        "or a Hugging Face id.",
    ),
]
Join = Annotated[
    str | None,
    _option("--join", "TICKET", "Join the cluster of this ticket; see `pxd ticket`.", "PXD_JOIN"),
]
DataDir = Annotated[
    Path | None,
    _option(
        "--data-dir",
        "DIR",
        "Where this node keeps its keys; another node needs another one.",
        "PXD_DATA_DIR",
    ),
]
Http = Annotated[
    str | None,
    _option(
        "--http", "HOST:PORT", f"Where the API listens. [dim]\\[default: {DEFAULT_HTTP}][/dim]"
    ),
]
Listen = Annotated[
    str | None,
    _option(
        "--listen",
        "HOST:PORT",
        f"Where other nodes connect. [dim]\\[default: {DEFAULT_LISTEN}][/dim]",
    ),
]
Name = Annotated[
    str | None,
    _option("--name", "NAME", "What to call this node. [dim]\\[default: the host's name][/dim]"),
]
Memory = Annotated[float | None, _option("--memory", "GIB", "The most memory to offer, in GiB.")]
MaxLayers = Annotated[int | None, _option("--max-layers", "N", "The most layers to hold.")]
KvTier = Annotated[
    float | None,
    _option(
        "--kv-tier",
        "GIB",
        "Keep up to this much of the attention caches that memory has no room for: on disk, or "
        "in the host's memory where a GPU has its own. [dim]\\[default: none][/dim]",
    ),
]
RequestTimeout = Annotated[
    float,
    _option(
        "--request-timeout",
        "SECONDS",
        "Give up requests to this node's API that take longer. "
        f"[dim]\\[default: {DEFAULT_REQUEST_TIMEOUT_S:g}][/dim]",
    ),
]
LeaveTimeout = Annotated[
    float,
    _option(
        "--leave-timeout",
        "SECONDS",
        "When told to stop, wait up to this long for others to take over; 0 is at once. "
        f"[dim]\\[default: {DEFAULT_LEAVE_TIMEOUT_S:g}][/dim]",
    ),
]
Speculation = Annotated[
    Speculate,
    typer.Option(
        "--speculate",
        help="Guess tokens ahead from what was said before and have the model check them: where "
        "links are slow, or wherever this node is the first of a chain, or never.",
    ),
]
Wire = Annotated[
    WireDtype,
    _option(
        "--wire-dtype",
        "TYPE",
        "How this node sends hidden states to the next stage; other nodes choose for themselves. "
        "native is exact. fp8 and int8 halve the bytes, and answers may differ from those of one "
        "machine, or change course where another pipeline takes over. auto is fp8 where the link "
        "is slower than the computing. [dim]\\[default: native][/dim]",
    ),
]
Executor = Annotated[
    ExecutorChoice,
    _option(
        "--executor",
        "KIND",
        "What runs the model here: mlx, torch (needs pxd[torch]), sglang (needs pxd[sglang] and an "
        "NVIDIA GPU), or auto: mlx or torch, what can use a GPU, and mlx on a CPU. "
        "[dim]\\[default: auto][/dim]",
    ),
]
TensorParallel = Annotated[
    int,
    _option(
        "--tp",
        "N",
        "Spread each stage over N GPUs of this machine; with --executor sglang only. "
        "[dim]\\[default: 1][/dim]",
    ),
]
Priority = Annotated[
    int,
    _option(
        "--priority",
        "N",
        "Lead the cluster rather than nodes with a smaller number, from -1000 to 1000; for a "
        "machine that is always on. [dim]\\[default: 0][/dim]",
    ),
]
NoMdns = Annotated[bool, typer.Option("--no-mdns", help="Do not look for nodes on the LAN.")]
Relay = Annotated[
    bool,
    typer.Option(
        "--relay",
        help="Pass traffic on for members that cannot reach each other; for a node that all can.",
    ),
]
Admit = Annotated[
    Admission,
    typer.Option(
        "--admission",
        help="Let a request in only when its longest possible answer has room (reserve), or as "
        "soon as its prompt has, and have the latest comer begin again when room runs out "
        "(preempt).",
    ),
]
Format = Annotated[LogFormat, typer.Option("--log-format", help="How to log, to stderr.")]


class BadOption(Exception):
    """An option's value makes no sense; the message says why."""


def _check_endpoint(option: str, value: str | None) -> None:
    if value is not None:
        try:
            parse_endpoint(value)
        except ValueError as error:
            raise BadOption(f"{option}: {error}") from error


def _check_ticket(value: str | None) -> None:
    from pxd.identity import IdentityError, Ticket

    if value is not None:
        try:
            Ticket.parse(value)
        except IdentityError as error:
            raise BadOption(f"--join: {error}") from error


def _check_tensor_parallel(ranks: int, executor: ExecutorChoice) -> None:
    if not 1 <= ranks <= MAX_RANKS:
        raise BadOption(f"--tp: {ranks} is not between 1 and {MAX_RANKS}")
    if ranks > 1 and executor != "sglang":
        raise BadOption("--tp: only --executor sglang can spread a stage over several GPUs")


def _node_name(value: str | None) -> str:
    name = default_name() if value is None else value.strip()
    if not 0 < len(name) <= 64 or not name.isprintable():
        raise BadOption("--name: a name has 1 to 64 printable characters")
    return name


def resolve_model(value: str | None) -> str | None:
    """A directory becomes an absolute path; the demo and hub ids stay as they are.

    Raises `BadOption` for what is clearly meant as a directory and is none.
    """
    if value is None or value == DEFAULT_MODEL:
        return value
    if value and (path := Path(value).expanduser()).is_dir():
        return str(path.resolve())
    if not value or value.startswith((".", "~", "/")):
        raise BadOption(f"--model: there is no directory {value!r}")
    return value


def build_settings(
    *,
    model: str | None = None,
    join: str | None = None,
    data_dir: Path | None = None,
    http: str | None = None,
    listen: str | None = None,
    name: str | None = None,
    memory: float | None = None,
    max_layers: int | None = None,
    kv_tier: float | None = None,
    request_timeout: float = DEFAULT_REQUEST_TIMEOUT_S,
    leave_timeout: float = DEFAULT_LEAVE_TIMEOUT_S,
    admission: Admission = Admission.preempt,
    speculate: Speculate = Speculate.auto,
    wire_dtype: WireDtype = "native",
    executor: ExecutorChoice = "auto",
    tensor_parallel: int = 1,
    priority: int = 0,
    mdns: bool = True,
    relay: bool = False,
    log_format: LogFormat = LogFormat.text,
) -> Settings:
    """Raises `BadOption`."""
    _check_endpoint("--http", http)
    _check_endpoint("--listen", listen)
    _check_ticket(join)
    if memory is not None and not (memory > 0 and math.isfinite(memory)):
        raise BadOption(f"--memory: {memory:g} GiB is nothing to offer; give a number above 0")
    if max_layers is not None and max_layers < 1:
        raise BadOption(f"--max-layers: {max_layers} is too few; give 1 or more")
    if kv_tier is not None and not (kv_tier > 0 and math.isfinite(kv_tier)):
        raise BadOption(f"--kv-tier: {kv_tier:g} GiB keep nothing; give a number above 0")
    if not 0 < request_timeout <= MAX_TIMEOUT_S:
        raise BadOption(
            f"--request-timeout: {request_timeout:g} s is not between 0 and {MAX_TIMEOUT_S:g} s"
        )
    _check_tensor_parallel(tensor_parallel, executor)
    if not 0 <= leave_timeout <= MAX_LEAVE_TIMEOUT_S:
        raise BadOption(
            f"--leave-timeout: {leave_timeout:g} s is not between 0 and {MAX_LEAVE_TIMEOUT_S:g} s"
        )
    if not -1000 <= priority <= 1000:
        raise BadOption(f"--priority: {priority} is not between -1000 and 1000")
    return Settings(
        data_dir=(data_dir or data_dir_of_environment()).expanduser().absolute(),
        name=_node_name(name),
        model=resolve_model(model),
        join=join,
        http=http,
        listen=listen,
        memory=memory,
        max_layers=max_layers,
        kv_tier=kv_tier,
        request_timeout=request_timeout,
        leave_timeout=leave_timeout,
        admission=admission.value,
        speculate=speculate.value,
        wire_dtype=wire_dtype,
        executor=executor,
        tensor_parallel=tensor_parallel,
        priority=priority,
        mdns=mdns,
        relay=relay,
        log_format=log_format.value,
    )


def start(
    model: Model = None,
    join: Join = None,
    data_dir: DataDir = None,
    http: Http = None,
    listen: Listen = None,
    name: Name = None,
    memory: Memory = None,
    max_layers: MaxLayers = None,
    kv_tier: KvTier = None,
    request_timeout: RequestTimeout = DEFAULT_REQUEST_TIMEOUT_S,
    leave_timeout: LeaveTimeout = DEFAULT_LEAVE_TIMEOUT_S,
    admission: Admit = Admission.preempt,
    speculate: Speculation = Speculate.auto,
    wire_dtype: Wire = "native",
    executor: Executor = "auto",
    tensor_parallel: TensorParallel = 1,
    priority: Priority = 0,
    no_mdns: NoMdns = False,
    relay: Relay = False,
    log_format: Format = LogFormat.text,
) -> None:
    try:
        settings = build_settings(
            model=model,
            join=join,
            data_dir=data_dir,
            http=http,
            listen=listen,
            name=name,
            memory=memory,
            max_layers=max_layers,
            kv_tier=kv_tier,
            request_timeout=request_timeout,
            leave_timeout=leave_timeout,
            admission=admission,
            speculate=speculate,
            wire_dtype=wire_dtype,
            executor=executor,
            tensor_parallel=tensor_parallel,
            priority=priority,
            mdns=not no_mdns,
            relay=relay,
            log_format=log_format,
        )
    except BadOption as error:
        fail(str(error), 2)
    _run(settings)


def _run(settings: Settings) -> None:
    from pxd.cli import logs, welcome

    logs.set_up(settings.log_format)
    try:
        import trio

        from pxd import node
        from pxd.identity import IdentityError

        try:
            trio.run(partial(node.run, settings, started=partial(welcome.welcome, settings)))
        except (IdentityError, node.StartupError) as error:
            fail(str(error))
    except KeyboardInterrupt:
        # Before the daemon took over the signals.
        raise typer.Exit(130) from None
