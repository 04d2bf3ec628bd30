"""`pxd status` for a pipe: aligned text, one thing a line, no colour."""

from collections.abc import Sequence

from pxd.cli.overview import Link, Model, Node, Overview, Stage


def columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of left-aligned columns two spaces apart, without trailing spaces."""
    table = [header, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]


def pipeline(links: Sequence[Link], arrow: str = "→") -> str:
    return f" {arrow} ".join(
        f"{link.node} {link.layers}" + (f" {link.words}" if link.words else "") for link in links
    )


def _stage(stage: Stage) -> str:
    return f"{stage.model} {stage.layers} {stage.words}"


def _node(node: Node) -> list[str]:
    return [
        node.name,
        node.words,
        node.device,
        node.memory,
        "; ".join(_stage(stage) for stage in node.stages) or "-",
        node.roles or "-",
    ]


def _model(model: Model, arrow: str) -> list[list[str]]:
    detail = []
    for links, figures in zip(model.pipelines, model.figures, strict=True):
        detail += [pipeline(links, arrow), *([f"  {figures}"] if figures else [])]
    detail += [f"retiring: {pipeline(links, arrow)}" for links in model.retiring]
    detail += [f"spare: {model.spares}"] if model.spares else []
    detail += [model.reason] if model.reason else []
    detail = detail or ["-"]
    first = [model.name, model.state, str(model.layers), detail[0]]
    return [first, *(["", "", "", line] for line in detail[1:])]


def models(view: Overview, *, arrow: str = "→") -> list[str]:
    """The models, one line for each of their pipelines."""
    rows = [row for model in view.models for row in _model(model, arrow)]
    header = ("MODEL", "STATE", "LAYERS", "PIPELINE")
    return columns(header, rows or [["-", "waiting", "-", "no plan yet"]])


def render(view: Overview, *, arrow: str = "→") -> str:
    """The whole status, one line for every node."""
    lines = [
        f"{view.name} at {view.http}, up {view.uptime}",
        f"leader {view.leader}, term {view.term}, epoch {view.epoch}, "
        f"{view.alive} of {len(view.nodes)} nodes alive",
        "",
        *columns(
            ("NODE", "STATE", "DEVICE", "MEMORY", "STAGES", "ROLE"),
            [_node(node) for node in view.nodes],
        ),
        "",
        *models(view, arrow=arrow),
    ]
    if view.problems:
        lines += ["", *columns(("NODE", "PROBLEM"), view.problems)]
    return "\n".join(lines) + "\n"
