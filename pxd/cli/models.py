"""`pxd models`: which models the cluster serves."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli import key, progress
from pxd.cli.ask import ask
from pxd.cli.options import DataDir, Node, fail, with_examples
from pxd.cli.words import clean

if TYPE_CHECKING:
    from pxd.serving.choice import Chosen
    from pxd.serving.status import ClusterStatus

USE_HELP = with_examples(
    "Have the cluster serve a model, beside those that it serves already and where memory allows. "
    "All nodes remember it.",
    ("pxd models use Qwen/Qwen3-8B", "beside the others; waits until it is served"),
    ("pxd models use --only demo", "the others end once it is served"),
)
STOP_HELP = with_examples(
    "Have the cluster serve a model no more. It takes no new requests, and those that run have a "
    "minute to end.",
    ("pxd models stop demo", "by its name, or by the last part of it"),
)
LIST_HELP = with_examples(
    "Show the models, their states, and which nodes hold which layers.",
    ("pxd models list", ""),
    ("pxd models list --json", "for programs"),
)

app = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")

Model = Annotated[
    str, typer.Argument(metavar="NAME", help="`demo`, a directory, or a Hugging Face id.")
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
        sys.stdout.write(key.as_json_text({"models": status.models}))
    else:
        sys.stdout.write("\n".join(plain.models(overview.overview(status), arrow=arrow)) + "\n")


@app.command("use", help=USE_HELP, short_help="Serve a model.")
def use(
    name: Model,
    only: Only = False,
    no_wait: progress.NoWait = False,
    node: Node = None,
    data_dir: DataDir = None,
    as_json: key.Json = False,
) -> None:
    from pxd.cli.start import BadOption, resolve_model

    try:
        model = resolve_model(name)
    except BadOption as error:
        fail(str(error).removeprefix("--model: "), 2)
    result = _ask("use", {"model": model, "only": only}, node, data_dir)
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
    result = _ask("stop", {"model": name}, node, data_dir)
    if as_json:
        sys.stdout.write(key.as_json_text(result))
    else:
        print(_chosen(result))
    if not no_wait:
        progress.wait(node, data_dir, lambda status: _until_gone(status, result), quiet=as_json)
        if not as_json:
            model = clean(result.model)
            print(f"{model} is stopped; `pxd models use {model}` serves it again.")


def _ask(verb: str, body: object, node: str | None, data_dir: Path | None) -> "Chosen":
    from pxd.serving.choice import Chosen

    return ask(f"/cluster/models/{verb}", body, Chosen, node, data_dir)


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
