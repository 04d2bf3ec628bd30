"""`pxd models`: which models the cluster serves, and which files this node keeps."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from pxd.cli import key, progress
from pxd.cli.ask import ask, ask_patiently
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.serving.choice import Chosen
    from pxd.serving.status import AddedView, ClusterStatus

USE_HELP = with_examples(
    "Have the cluster serve a model, beside those that it serves already and where memory allows. "
    "All nodes remember it.",
    ("pxd models use Qwen/Qwen3-8B", "beside the others; waits until it is served"),
    ("pxd models use --only demo", "the others end once it is served"),
    ("pxd models use Qwen/Qwen3-8B --quantize 4", "makes Qwen/Qwen3-8B-4bit and serves that"),
)
STOP_HELP = with_examples(
    "Have the cluster serve a model no more. It takes no new requests, and those that run have a "
    "minute to end.",
    ("pxd models stop demo", "by its name, or by the last part of it"),
)
ADD_HELP = with_examples(
    "Have all files of a model on this node, from other nodes or else from the hub. Others can "
    "then fetch what they need from here. Nothing is served because of it.",
    ("pxd models add Qwen/Qwen3-8B", "waits until it is here"),
    ("pxd models add ~/models/tiny", "a directory on this machine; it stays where it is"),
    ("pxd models add Qwen/Qwen3-8B --quantize 4", "makes Qwen/Qwen3-8B-4bit of it"),
)
REMOVE_HELP = with_examples(
    "Undo `pxd models add`, and delete what this node has fetched of a model from other nodes. A "
    "directory of your own and the hub's cache are left alone.",
    ("pxd models remove Qwen/Qwen3-8B", ""),
)
LIST_HELP = with_examples(
    "Show the models, their states, which nodes hold which layers, and which have files.",
    ("pxd models list", ""),
    ("pxd models list --json", "for programs"),
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

AnswerT = TypeVar("AnswerT")

Model = Annotated[
    str, typer.Argument(metavar="NAME", help="`demo`, a directory, or a Hugging Face id.")
]
Quantize = Annotated[
    int | None,
    typer.Option(
        "--quantize",
        metavar="BITS",
        help="A copy with 2, 3, 4, 5, 6 or 8 bits for each weight, made on this node by MLX; "
        "it is called NAME-BITSbit.",
    ),
]
Only = Annotated[bool, typer.Option("--only", help="Instead of the others.")]


@app.command("list", help=LIST_HELP, short_help="Show the models.")
def list_models(node: Node = None, data_dir: DataDir = None, as_json: key.Json = False) -> None:
    from pxd.cli import overview, plain
    from pxd.cli.status import Failed, fetch, has_unicode

    try:
        _, status = fetch(node, data_dir)
    except Failed as error:
        fail(str(error))
    arrow = "→" if has_unicode() else "->"
    if as_json:
        files = {node.name: node.files for node in status.nodes if node.files}
        content = {"models": status.models, "files": files, "added": status.added}
        sys.stdout.write(key.as_json_text(content))
        return
    lines = plain.models(overview.overview(status), arrow=arrow)
    if files_of := overview.files(status):
        lines += ["", *plain.columns(("FILES OF", "ON"), files_of)]
    if coming := [_coming(view) for view in status.added if view.state != "here"]:
        lines += ["", *plain.columns(("ADDED HERE", "STATE", "HERE", "REASON"), coming)]
    sys.stdout.write("\n".join(lines) + "\n")


@app.command("use", help=USE_HELP, short_help="Serve a model.")
def use(
    name: Model,
    only: Only = False,
    quantize: Quantize = None,
    no_wait: progress.NoWait = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    from pxd.serving.choice import Chosen

    model = _resolved(name)
    if quantize is not None:
        if no_wait:
            fail("--no-wait does not go with --quantize: the copy can be served once it is made", 2)
        model = _add(model, quantize, node, data_dir, no_wait=False, quiet=as_json).name
    body = {"model": model, "only": only}
    result = _ask_patiently("use", body, Chosen, node, data_dir, quiet=as_json)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
    else:
        print(_chosen(result))
    if not no_wait:
        progress.wait(node, data_dir, lambda status: _until_served(status, result), quiet=as_json)
        if not as_json:
            print(f"{clean(result.model)} is served.")


@app.command("stop", help=STOP_HELP, short_help="Serve a model no more.")
def stop(
    name: Model,
    no_wait: progress.NoWait = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    from pxd.serving.choice import Chosen

    result = ask("/cluster/models/stop", {"model": _known(name)}, Chosen, node, data_dir)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
    else:
        print(_chosen(result))
    if not no_wait:
        progress.wait(node, data_dir, lambda status: _until_gone(status, result), quiet=as_json)
        if not as_json:
            model = clean(result.model)
            command = f"pxd models use {_word(result.model)}"
            print(f"{model} is stopped; `{command}` serves it again.")


@app.command("add", help=ADD_HELP, short_help="Have a model's files on this node.")
def add(
    name: Model,
    quantize: Quantize = None,
    no_wait: progress.NoWait = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    result = _add(_resolved(name), quantize, node, data_dir, no_wait=no_wait, quiet=as_json)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
    else:
        state = "on its way to this node" if no_wait and result.state != "here" else "on this node"
        print(f"{clean(result.name)} is {state}; `pxd models use {_word(result.name)}` serves it.")


@app.command("remove", help=REMOVE_HELP, short_help="Delete a model's files that came here.")
def remove(
    name: Model, node: Node = None, data_dir: DataDir = None, as_json: key.Json = False
) -> None:
    from pxd.serving.added import Removed

    result = ask("/cluster/models/remove", {"model": _known(name)}, Removed, node, data_dir)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
        return
    done = "What pxd had kept of it is deleted." if result.deleted else "Nothing is deleted."
    left = f" {clean(result.left)} is left alone." if result.left else ""
    print(f"{clean(result.model)} is no longer kept here. {done}{left}")


def _resolved(name: str) -> str:
    """An absolute path for a directory. Ends the command for what can only be one and is none."""
    from pxd.cli.start import BadOption, resolve_model

    try:
        return resolve_model(name) or name
    except BadOption as error:
        fail(str(error).removeprefix("--model: "), 2)


def _coming(view: "AddedView") -> tuple[str, ...]:
    return clean(view.name), view.state, f"{view.progress:.0%}", clean(view.reason) or "-"


def _word(name: str) -> str:
    """As a shell takes it."""
    return shlex.quote(clean(name))


def _known(name: str) -> str:
    """As `_resolved`, for what may be gone by now, or may be named by its last part alone."""
    path = Path(name).expanduser()
    return str(path.resolve()) if (name.startswith(".") or "/" in name) and path.is_dir() else name


def _add(
    model: str,
    bits: int | None,
    node: str | None,
    data_dir: Path | None,
    *,
    no_wait: bool,
    quiet: bool,
) -> "AddedView":
    from pxd.models.quantized import BITS
    from pxd.serving.status import AddedView

    body: dict[str, object] = {"model": model}
    if bits is not None:
        if bits not in BITS:
            fail(f"--quantize: MLX has {', '.join(map(str, BITS))} bits, not {bits}", 2)
        body["quantize"] = bits
    result = _ask_patiently("add", body, AddedView, node, data_dir, quiet=quiet)
    if not no_wait:
        progress.wait(node, data_dir, lambda status: _until_here(status, result.name), quiet=quiet)
    return result


def _ask_patiently(
    verb: str,
    body: object,
    answer: type[AnswerT],
    node: str | None,
    data_dir: Path | None,
    *,
    quiet: bool,
) -> AnswerT:
    """For what makes the daemon find out about a model, which takes minutes for a large one."""
    return ask_patiently(
        f"/cluster/models/{verb}",
        body,
        answer,
        node,
        data_dir,
        lambda status: clean(status.looking) or "waiting for the daemon",
        quiet=quiet,
    )


def _until_here(status: "ClusterStatus", name: str) -> str:
    view = next((each for each in status.added if each.name == name), None)
    if view is None:
        raise progress.Stuck(f"{clean(name)} was removed meanwhile")
    if view.state == "failed":
        raise progress.Stuck(f"{clean(name)} cannot be fetched: {clean(view.reason)}")
    if view.state == "here":
        return ""
    where = f", {clean(view.reason)}" if view.reason else ""
    return f"{clean(name)} {view.progress:.0%} here{where}"


def _chosen(result: "Chosen") -> str:
    names = ", ".join(clean(name) for name in result.names) or "no model"
    ending = ", ".join(clean(name) for name in result.outgoing)
    return f"The cluster is to serve {names}" + (f"; {ending} until then." if ending else ".")


def _until_served(status: "ClusterStatus", result: "Chosen") -> str:
    """What there is to wait for; empty once the model is served. Raises `progress.Stuck`."""
    name = clean(result.model)
    model = next((each for each in status.models if each.name == result.model), None)
    if model is None:
        return f"{name} is being planned"
    if model.state == "serving" and model.pipelines:
        return ""
    others_end = any(each.state == "stopping" for each in status.models)
    if model.state == "failed" or (model.state == "waiting" and not others_end):
        state = "failed" if model.state == "failed" else "has to wait"
        raise progress.Stuck(f"{name} {state}: {clean(model.reason)}")
    return progress.loading(status) or f"{name} is {model.state}: {clean(model.reason)}"


def _until_gone(status: "ClusterStatus", result: "Chosen") -> str:
    name = clean(result.model)
    if all(model.name != result.model for model in status.models):
        return ""
    return f"{name} ends; requests that run have a minute"
