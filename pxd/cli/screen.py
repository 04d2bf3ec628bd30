"""`pxd status` for people: drawn with rich, every state by colour and by word."""

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pxd.cli.overview import Link, Model, Node, Overview, Stage

_COLOURS = {
    "alive": "green",
    "ready": "green",
    "serving": "green",
    "suspect": "yellow",
    "loading": "yellow",
    "restarting": "yellow",
    "waiting": "yellow",
    "dead": "red",
    "failed": "red",
    "left": "bright_black",
}
_SIGNS = {"alive": "●", "serving": "●", "suspect": "◐", "loading": "◐", "dead": "✗", "failed": "✗"}

_GAP = 2
_NARROWEST_DEVICE = 12


def colour(state: str) -> str:
    return _COLOURS.get(state, "yellow")


def _state(state: str, words: str) -> Text:
    return Text(no_wrap=True).append(f"{_SIGNS.get(state, '○')} {words}", colour(state))


def bar(stage: Stage, width: int) -> Text:
    """The stage's place among all layers; what is not loaded yet is thin."""
    text = Text(no_wrap=True)
    first = min(stage.start * width // max(stage.total, 1), width - 1)
    last = max(first + 1, stage.end * width // max(stage.total, 1))
    loaded = round((last - first) * stage.progress)
    text.append("─" * first, "bright_black")
    text.append("━" * loaded, colour(stage.state))
    text.append("╌" * (last - first - loaded), colour(stage.state))
    text.append("─" * (width - last), "bright_black")
    return text


def _stages(node: Node, width: int, *, with_model: bool) -> Text:
    lines = []
    for stage in node.stages:
        line = (
            bar(stage, width).append(f" {stage.layers} ").append(stage.words, colour(stage.state))
        )
        lines.append(line.append(f" {stage.model}", "dim") if with_model else line)
    return Text("\n").join(lines) if lines else Text("-", "bright_black")


def _name(node: Node) -> Text:
    text = Text().append(node.name, "bold")
    if node.roles:
        text.append(f"\n{node.roles}", "bright_black")
    return text


class _Column(msgspec.Struct):
    """Cells of one or more lines, as wide as the widest of them."""

    header: str
    cells: list[Text]
    width: int = 0
    right: bool = False

    def __post_init__(self) -> None:
        lines = [line for cell in self.cells for line in cell.split(allow_blank=True)]
        self.width = max(cell_len(self.header), *(line.cell_len for line in lines))


def _columns(view: Overview, width: int) -> list[_Column]:
    """What fits into `width`, in the order in which it is shown."""
    models = {stage.model for node in view.nodes for stage in node.stages}
    bar_width = min(16, max(5, width // 8))

    def column(header: str, cells: list[Text], *, right: bool = False) -> _Column:
        return _Column(header, cells, right=right)

    nodes = view.nodes
    name = column("node", [_name(node) for node in nodes])
    name.width = min(name.width, 18)
    state = column("state", [_state(node.state, node.words) for node in nodes])
    device = column("device", [Text(node.device) for node in nodes])
    memory = column("memory", [Text(node.memory) for node in nodes], right=True)
    layers = column(
        "layers", [_stages(node, bar_width, with_model=len(models) > 1) for node in nodes]
    )
    load = column("requests", [Text(node.load or "-") for node in nodes])
    rtt = column("rtt", [Text(node.rtt or "-") for node in nodes], right=True)
    speed = column("speed", [Text(node.speed or "-") for node in nodes])

    room = width - sum(each.width + _GAP for each in (name, state, layers))
    shown = [name, state, layers]
    for each in (memory, device, load, rtt, speed):
        if each is device and each.width + _GAP > room >= _NARROWEST_DEVICE + _GAP:
            each.width = room - _GAP
        if each.width + _GAP <= room:
            shown.append(each)
            room -= each.width + _GAP
    return [
        each
        for each in (name, state, device, memory, layers, load, rtt, speed)
        if any(each is one for one in shown)
    ]


def _nodes(view: Overview, width: int) -> Table:
    table = Table(box=None, header_style="bright_black", pad_edge=False, padding=(0, _GAP, 0, 0))
    columns = _columns(view, width)
    for column in columns:
        table.add_column(
            column.header,
            width=column.width,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if column.right else "left",
        )
    for number, node in enumerate(view.nodes):
        style = "dim" if node.state in ("dead", "left") else None
        table.add_row(*(column.cells[number] for column in columns), style=style)
    return table


def _pipeline(links: list[Link]) -> Text:
    text = Text()
    for number, link in enumerate(links):
        text.append(" → " if number else "", "bright_black")
        text.append(link.node, "bold").append(f" {link.layers}")
        if link.words:
            text.append(f" {link.words}", colour(link.state))
    return text


def _model(model: Model) -> RenderableType:
    head = _state(model.state, model.state)
    head.append(f"  {model.name}", "bold")
    if model.layers:
        head.append(f"  {model.layers} layers", "bright_black")
    lines: list[RenderableType] = [head]
    for links, figures in zip(model.pipelines, model.figures, strict=True):
        lines.append(Padding(_pipeline(links), (0, 0, 0, 2)))
        if figures:
            lines.append(Padding(Text(figures, "bright_black"), (0, 0, 0, 4)))
    for links in model.retiring:
        retiring = Text("retiring: ", "bright_black").append_text(_pipeline(links))
        lines.append(Padding(retiring, (0, 0, 0, 2)))
    if model.spares:
        lines.append(Padding(Text(f"spare: {model.spares}", "bright_black"), (0, 0, 0, 2)))
    if model.reason:
        lines.append(Padding(Text(model.reason, colour(model.state)), (0, 0, 0, 2)))
    return Group(*lines)


def _heading(view: Overview) -> Text:
    text = Text().append("pxd ", "bold cyan").append(view.name, "bold")
    text.append(f"  {view.http}").append(f"  up {view.uptime}", "bright_black")
    every = view.alive == len(view.nodes)
    text.append("\n")
    text.append(f"{view.alive} of {len(view.nodes)} nodes alive", "green" if every else "yellow")
    for label, value in (("leader", view.leader), ("term", str(view.term)), ("epoch", view.epoch)):
        text.append(f" · {label} ", "bright_black").append(value)
    return text


def _problems(view: Overview) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(style="yellow", no_wrap=True)
    table.add_column()
    for name, problem in view.problems:
        table.add_row(Text(f"! {name}"), Text(problem))
    return table


class Screen:
    """A renderable that uses the width it is given."""

    def __init__(self, view: Overview) -> None:
        self._view = view

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        view = self._view
        yield _heading(view)
        yield Text()
        if not view.models:
            yield _state("waiting", "no plan yet")
        for model in view.models:
            yield _model(model)
        yield Text()
        yield _nodes(view, options.max_width)
        if view.problems:
            yield Text()
            yield _problems(view)
