"""`pxd plan` for people: pipelines drawn with rich; no meaning hangs on colour alone."""

from collections.abc import Mapping

import msgspec
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pxd.cli import plan_words
from pxd.cli.plan_report import Report, Stage, StageTimes
from pxd.cli.plan_words import Words, milliseconds
from pxd.cli.words import clean, layers, memory

_GAP = 2
_INDENT = 2
_WIDEST_NAME = 24
_NARROWEST_NAME = 12
_WIDEST_BAR = 32
_GOOD_BAR = 16
_NARROWEST_BAR = 6
_MOST_PIPELINES = 32
_MOST_NODES = 64


class _Row(msgspec.Struct, frozen=True):
    """The cells of one stage, by column."""

    stage: Stage
    cells: dict[str, str]


class Screen:
    """A renderable that uses the width it is given."""

    def __init__(
        self, report: Report, names: Mapping[str, str], machines: Mapping[str, str]
    ) -> None:
        self._report = report
        self._machines = machines
        self._words = Words(report, names)
        self._nodes = {node.id: node for node in report.nodes}

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        report = self._report
        heading = Text().append("pxd plan ", "bold cyan").append(clean(report.model.name), "bold")
        yield heading.append(f"  {plan_words.summary(report)}")
        yield Text(plan_words.settings(report), "bright_black")
        yield Text()
        if report.reason is None:
            yield Text(plan_words.total(report), "green")
            yield from self._pipelines(options.max_width - _INDENT)
            yield from self._leftovers()
        else:
            yield Text(f"✗ no pipeline: {clean(report.reason)}", "red")
            yield from self._holdings(options.max_width)
        yield from self._one_more()

    def _pipelines(self, width: int) -> RenderResult:
        predicted = self._report.predicted.pipelines[:_MOST_PIPELINES]
        pipelines = [
            [
                self._row(stage, times, slow=stage.node == figures.bottleneck)
                for stage, times in zip(stages, figures.stages, strict=True)
            ]
            for stages, figures in zip(self._report.pipelines, predicted, strict=False)
        ]
        columns, bar = _columns([row for rows in pipelines for row in rows], width)
        for number, (figures, rows) in enumerate(zip(predicted, pipelines, strict=True), 1):
            yield Text()
            yield Text().append(f"pipeline {number}  ", "bold").append(plan_words.peak(figures))
            yield _indented(Text(plan_words.alone(figures)))
            yield _indented(_stages(rows, columns, bar, self._report.model.layers))
        yield from _more(len(self._report.pipelines) - _MOST_PIPELINES, "pipelines")

    def _row(self, stage: Stage, times: StageTimes, *, slow: bool) -> _Row:
        node = self._nodes[stage.node]
        return _Row(
            stage,
            {
                "node": self._name(stage.node),
                "machine": clean(self._machines.get(stage.node, "")),
                "layers": layers(stage.start, stage.end),
                "memory": f"{node.used_gib:.1f}/{memory(node.memory_gib)}",
                "prompt": milliseconds(times.prefill_ms),
                "token": milliseconds(times.decode_ms),
                "hop": milliseconds(times.hop_ms),
                "": "◀ bottleneck" if slow else "",
            },
        )

    def _leftovers(self) -> RenderResult:
        if not self._report.leftovers:
            return
        table = _table("", "")
        for each in self._report.leftovers[:_MOST_NODES]:
            table.add_row(Text(self._name(each.node), "bold"), self._words.leftover(each))
        yield Text()
        yield Text("spare", "bold")
        yield _indented(table)
        yield from _more(len(self._report.leftovers) - _MOST_NODES, "spares")

    def _holdings(self, width: int) -> RenderResult:
        total = self._report.model.layers
        table = _table("node", "memory", "holds at most")
        for node in self._report.nodes[:_MOST_NODES]:
            held = min(node.capacity["plain"], total)
            line = _bar(0, held, total, max(_NARROWEST_BAR, min(_WIDEST_BAR, width // 3)))
            line.append(f"  {held} of {total} layers")
            table.add_row(Text(self._name(node.id), "bold"), memory(node.memory_gib), line)
        yield Text()
        yield _indented(table)
        yield from _more(len(self._report.nodes) - _MOST_NODES, "nodes")

    def _one_more(self) -> RenderResult:
        more = self._report.one_more
        yield Text()
        yield Text("one more machine", "bold")
        if more.skipped:
            yield _indented(Text(more.skipped, "bright_black"))
            return
        table = _table("", "")
        for each in more.candidates:
            helps = each.fits and each.gain > 0
            change = Text(self._words.change(each), "green" if helps else "")
            table.add_row(self._words.candidate(each), change)
        yield _indented(table)

    def _name(self, node: str) -> str:
        name = self._words.name(node)
        return name if len(name) <= _WIDEST_NAME else f"{name[: _WIDEST_NAME - 1]}…"


def _columns(rows: list[_Row], width: int) -> tuple[dict[str, int], int]:
    """Columns that fit, with their widths, and how wide a bar fits beside them.

    All pipelines share them, so that one can be compared with the other.
    """
    widths = {
        header: max(cell_len(header), *(cell_len(row.cells[header]) for row in rows))
        for header in rows[0].cells
    }
    if not any(row.cells["machine"] for row in rows):
        del widths["machine"]
    room = width - sum(wide + _GAP for wide in widths.values()) - _GAP
    for header in ("prompt", "machine"):
        if room < _GOOD_BAR and header in widths:
            room += widths.pop(header) + _GAP
    shortened = max(min(widths["node"], _NARROWEST_NAME), widths["node"] + room - _NARROWEST_BAR)
    if room < _NARROWEST_BAR:
        room += widths["node"] - shortened
        widths["node"] = shortened
    if room < _NARROWEST_BAR:
        room += widths.pop("hop") + _GAP
    return widths, max(_NARROWEST_BAR, min(_WIDEST_BAR, room))


def _stages(rows: list[_Row], columns: dict[str, int], bar: int, total: int) -> Table:
    table = Table(box=None, header_style="bright_black", pad_edge=False, padding=(0, _GAP, 0, 0))
    styles = {"node": "bold", "machine": "bright_black", "": "yellow"}
    for header, width in columns.items():
        if header == "layers":
            table.add_column("layers", width=bar)
        right = header in ("memory", "prompt", "token", "hop")
        table.add_column(
            "" if header == "layers" else header,
            width=width,
            no_wrap=True,
            overflow="ellipsis",
            justify="right" if right else "left",
        )
    for row in rows:
        cells = []
        for header in columns:
            if header == "layers":
                cells.append(_bar(row.stage.start, row.stage.end, total, bar))
            cells.append(Text(row.cells[header], styles.get(header, "")))
        table.add_row(*cells)
    return table


def _bar(start: int, end: int, total: int, width: int) -> Text:
    """The place of layers [start, end) among all."""
    first = min(start * width // total, width - 1)
    last = max(first + (end > start), end * width // total)
    text = Text(no_wrap=True).append("─" * first, "bright_black")
    text.append("━" * (last - first), "green")
    return text.append("─" * (width - last), "bright_black")


def _table(*headers: str) -> Table:
    table = Table(
        box=None,
        header_style="bright_black",
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
        show_header=any(headers),
    )
    for header in headers:
        table.add_column(header, justify="right" if header == "memory" else "left")
    return table


def _indented(what: RenderableType) -> Padding:
    return Padding(what, (0, 0, 0, _INDENT))


def _more(count: int, things: str) -> RenderResult:
    if count > 0:
        yield Text(f"… and {count} more {things}; --json has them all", "bright_black")
