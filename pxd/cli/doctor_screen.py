"""What `pxd doctor` found, for people: a mark and a sentence each, and under it what to do.

In a pipe it is the same without colour, and lines are not broken.
"""

from collections import Counter

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pxd.cli.words import clean
from pxd.doctor.findings import Finding, Report

_MARKS = {"ok": "✓", "note": "·", "warning": "!", "problem": "✗"}
_PLAIN_MARKS = {"ok": "+", "note": "-", "warning": "!", "problem": "X"}
_COLOURS = {"ok": "green", "note": "cyan", "warning": "yellow", "problem": "red"}
_PIPE_WIDTH = 10_000


def show(report: Report, *, unicode: bool = True) -> None:
    """Write it to standard output."""
    console = Console(highlight=False, emoji=False, markup=False)
    parts = Group(_heading(report), Text(), _table(report, unicode), Text(), _summary(report))
    if console.is_terminal:
        console.print(parts)
        return
    console.width = _PIPE_WIDTH
    with console.capture() as captured:
        console.print(parts)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _heading(report: Report) -> Text:
    text = Text("pxd doctor", "bold cyan").append(f"  {clean(report.node)}", "bold")
    text.append(f"  pxd {clean(report.version)}", "bright_black")
    if not report.daemon:
        text.append("  no daemon: only this machine was looked at", "yellow")
    return text


def _table(report: Report, unicode: bool) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    marks = _MARKS if unicode else _PLAIN_MARKS
    last = ""
    for finding in report.findings:
        colour = _COLOURS[finding.level]
        label = "" if finding.check == last else finding.check
        last = finding.check
        table.add_row(
            Text(marks[finding.level], f"bold {colour}"),
            Text(clean(label), "bright_black"),
            _body(finding, unicode),
        )
    return table


def _body(finding: Finding, unicode: bool) -> Group:
    loud = finding.level in ("warning", "problem")
    parts: list[Text | Padding] = [
        Text(clean(finding.text), _COLOURS[finding.level] if loud else "")
    ]
    parts += [Padding(Text(clean(line), "bright_black"), (0, 0, 0, 2)) for line in finding.details]
    if finding.remedy:
        arrow = "→ " if unicode else "-> "
        parts.append(Padding(_remedy(finding.remedy, arrow, loud=loud), (0, 0, 0, 2)))
    return Group(*parts)


def _remedy(remedy: str, arrow: str, *, loud: bool) -> Table:
    """The first line says what to do; further ones are commands, each to be copied as it is."""
    what, *commands = remedy.split("\n")
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column()
    words = Text(clean(what), "" if loud else "bright_black")
    grid.add_row(Text(arrow, "bold" if loud else "bright_black"), words)
    for command in commands:
        grid.add_row("", Text(f"  {clean(command)}", "cyan"))
    return grid


def _summary(report: Report) -> Text:
    counts = Counter(finding.level for finding in report.findings)
    problems, warnings = counts["problem"], counts["warning"]
    words = [
        f"{count} {word}{'s' * (count > 1)}"
        for count, word in ((problems, "problem"), (warnings, "warning"))
        if count
    ]
    colour = "red" if problems else "yellow" if warnings else "green"
    text = Text(", ".join(words) or "no problems found", f"bold {colour}")
    return text.append(f"  {report.seconds:.1f} s", "bright_black")
