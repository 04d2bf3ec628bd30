"""`pxd plan`: who would hold what, how fast that would be, and which machine to buy next."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pxd.cli.options import DataDir, Node, fail, with_examples

if TYPE_CHECKING:
    from pxd.cli.plan_inputs import Question, Shares
    from pxd.cli.plan_report import Report
    from pxd.planning.machines import Machine
    from pxd.planning.result import ClusterPlan, PlanInputs

Strategy = Literal["auto", "greedy", "dp"]

MAX_WHAT_IF = 8

HELP = with_examples(
    "Plan a model for the live cluster, or for machines that need not exist: who holds which "
    "layers, time to the first token, time per token, tokens/s, the bottleneck, and what one more "
    "machine would change or how much memory is missing.\n\n"
    '[bold]The cluster file[/bold] is {"nodes": \\[NODE, ...], "rtt_ms": {"a": {"b": 1.0}}, '
    '"bandwidth_gbps": {"a": {"b": 1.25}}, "water_fill_only": \\["a", "b"]}; all but the nodes may '
    "be left out. Every gbps is in gigabytes a second (1e9 bytes), not in bits. "
    "water_fill_only asks for one pipeline of these nodes in this order. "
    'A NODE is {"id": "a", "machine": "rtx-4090"}, or {"id": "a", "num_gpus": 1, '
    '"tflops_fp16": 165, "memory_gib": 24, "memory_bandwidth_gbps": 1008} with the figures of one '
    'of its GPUs; "count": 3 stands for a-1, a-2 and a-3. All of that memory counts, '
    "whereas a live node offers only a part of its own.\n\n"
    "[bold]Exit code[/bold]: 0 with a plan, 1 if the model does not fit (the answer says what is "
    "missing) or no daemon answers, 2 for input that cannot be used.",
    ("pxd plan", "the live cluster"),
    ("pxd plan --what-if rtx-4090", "with one more machine"),
    ("pxd plan --model Qwen/Qwen3-32B --cluster home.json", "machines of a file"),
    ("pxd plan --machines", "what the catalogue has"),
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="`demo`, a directory, a hub id, or a .json file: a config.json or plain cost fields. "
        "By default what the live cluster serves.",
    ),
]
ClusterFile = Annotated[
    Path | None,
    typer.Option("--cluster", metavar="FILE", help="Plan for the machines in this JSON file."),
]
StrategyName = Annotated[
    Strategy,
    typer.Option(
        "--strategy",
        help="How nodes are divided into pipelines; auto beats the others, but gives up to 15% of "
        "the tokens/s for a second pipeline, with which a death stops nothing.",
    ),
]
ParamRatio = Annotated[
    float | None,
    typer.Option(
        "--param-ratio",
        metavar="R",
        help="Part of each node's memory for weights, above 0 up to 1; by default 0.75.",
    ),
]
KvRatio = Annotated[
    float | None,
    typer.Option(
        "--kv-ratio", metavar="R", help="Part of each node's memory for KV caches; by default 0.2."
    ),
]
WhatIf = Annotated[
    list[str] | None,
    typer.Option(
        "--what-if", metavar="MACHINE", help="Also say what this machine would change. Repeatable."
    ),
]
Machines = Annotated[
    bool, typer.Option("--machines", help="List the machines that a file may name, and sources.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def plan(
    model: Model = None,
    cluster: ClusterFile = None,
    strategy: StrategyName = "auto",
    param_ratio: ParamRatio = None,
    kv_ratio: KvRatio = None,
    what_if: WhatIf = None,
    machines: Machines = False,
    as_json: Json = False,
    node: Node = None,
    data_dir: DataDir = None,
) -> None:
    if machines:
        from pxd.cli import plan_machines

        sys.stdout.write(plan_machines.as_json() if as_json else plan_machines.as_text())
        return
    from pxd.cli.client import Refused, Unreachable
    from pxd.cli.find import NoDaemon
    from pxd.cli.plan_inputs import BadInput, Shares
    from pxd.cli.words import clean

    try:
        shares = Shares(param_ratio, kv_ratio)
        wanted = _wanted(what_if or [])
        question = _ask(model, cluster, shares, node, data_dir)
    except BadInput as error:
        fail(clean(str(error)), 2)
    except (NoDaemon, Unreachable, Refused) as error:
        fail(clean(str(error)))
    answer = _answer(question, strategy, wanted)
    _show(answer, question, as_json=as_json)
    if answer.reason is not None:
        raise typer.Exit(1)


def _wanted(names: list[str]) -> list["Machine"]:
    from pxd.cli.plan_inputs import BadInput
    from pxd.planning.machines import find_machine

    if len(names) > MAX_WHAT_IF:
        raise BadInput(f"--what-if: at most {MAX_WHAT_IF} machines at once")
    try:
        return [find_machine(name) for name in names]
    except ValueError as error:
        raise BadInput(f"--what-if: {error}; `pxd plan --machines` lists all") from error


def _ask(
    model: str | None,
    cluster: Path | None,
    shares: "Shares",
    node: str | None,
    data_dir: Path | None,
) -> "Question":
    from pxd.cli.plan_inputs import ask_daemon, ask_file

    if cluster is not None:
        return ask_file(cluster, model, shares)
    return ask_daemon(node, data_dir, model, shares)


def _answer(question: "Question", strategy: Strategy, wanted: list["Machine"]) -> "Report":
    from pxd.cli.plan_more import one_more
    from pxd.cli.plan_report import OneMore, report
    from pxd.planning.planner import plan_cluster

    inputs = question.inputs
    if question.order:
        chosen = _in_order(inputs, question.order)
        more = OneMore([], "not with water_fill_only, which names the nodes to use")
        return report(question.model, inputs, chosen, more, "water_fill_only")

    def again(larger: "PlanInputs") -> "ClusterPlan":
        return plan_cluster(larger, strategy)

    found = again(inputs)
    more = one_more(inputs, found, again, question.machines, wanted)
    return report(question.model, inputs, found, more, strategy)


def _in_order(inputs: "PlanInputs", order: tuple[str, ...]) -> "ClusterPlan":
    """The one pipeline asked for; where there is none, the reason is about its nodes alone."""
    import msgspec

    from pxd.planning.planner import plan_chain

    found = plan_chain(inputs, order)
    if found.pipelines:
        return found
    offers = tuple(offer for offer in inputs.offers if offer.id in order)
    shortage = plan_chain(msgspec.structs.replace(inputs, offers=offers), order).shortage
    if shortage is not None and not shortage.missing_layers:
        reason = "the nodes of water_fill_only cannot hold the model in this order"
        shortage = msgspec.structs.replace(shortage, missing_bytes=0, reason=reason)
    return msgspec.structs.replace(found, shortage=shortage)


def _show(answer: "Report", question: "Question", *, as_json: bool) -> None:
    if as_json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(answer)).decode() + "\n")
    elif sys.stdout.isatty() and sys.stdout.encoding.lower().startswith("utf"):
        from rich.console import Console

        from pxd.cli.plan_screen import Screen

        Console(highlight=False).print(Screen(answer, question.names, question.machines))
    else:
        from pxd.cli.plan_plain import render

        sys.stdout.write(render(answer, question.names))
