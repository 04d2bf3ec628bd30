"""What was measured, as rows with medians and spread; and what the floors say of them. Pure."""

import platform
import statistics
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Verdict = Literal["ok", "below", "not measured"]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the table.

    `ours` and `theirs` have one figure per round in `unit`, taken in turns; without a peer `theirs`
    is empty. `ratios` say how many times better ours was, round by round: above 1 is better.
    """

    section: str
    key: str
    what: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be measured here, and why."""

    section: str
    what: str
    why: str


def compare(
    section: str,
    key: str,
    what: str,
    unit: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    more_is_better: bool,
) -> Row:
    """A row of two series, whose figures of one place were taken one after the other."""
    pairs = list(zip(ours, theirs, strict=True))
    ratios = tuple(a / b if more_is_better else b / a for a, b in pairs)
    return Row(
        section=section,
        key=key,
        what=what,
        unit=unit,
        ours=tuple(ours),
        theirs=tuple(theirs),
        ratios=ratios,
    )


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """What a row must reach: a ratio of at least `least`, or a figure of at most `most`."""

    what: str
    key: str
    least: float | None = None
    most: float | None = None
    unit: str = "x"

    def measured(self, rows: Iterable[Row]) -> float | None:
        """The median of the row's ratios, or of its figures where the floor is a figure."""
        for row in rows:
            if row.key == self.key:
                return statistics.median(row.ratios if self.least is not None else row.ours)
        return None

    def verdict(self, rows: Iterable[Row]) -> Verdict:
        found = self.measured(rows)
        if found is None:
            return "not measured"
        good = found >= self.least if self.least is not None else found <= (self.most or 0.0)
        return "ok" if good else "below"


FLOORS = (
    Floor(
        what="1 node vs mlx_lm.server, 1 stream, time per token (100m)",
        key="one.100m.1.token",
        least=1.0,
    ),
    Floor(
        what="1 node vs mlx_lm.server, 8 streams, tokens/s (100m)",
        key="one.100m.8.rate",
        least=1.2,
    ),
    Floor(
        what="2 nodes vs mlx.launch ring pipeline, 1 stream (0.6b)",
        key="split.0.6b.launch.token",
        least=1.5,
    ),
    Floor(
        what="2 nodes, 8 streams vs 1 stream, tokens/s (100m)",
        key="split.100m.2.streams",
        least=2.0,
    ),
    Floor(
        what="overhead of a 2-stage split beyond the forward passes (tiny)",
        key="split.tiny.overhead",
        most=2.0,
        unit=" ms",
    ),
    Floor(what="head overhead per step, 64 requests", key="head.64", most=1.0, unit=" ms"),
    Floor(what="prefix hit of 2,000 tokens vs miss, TTFT (tiny)", key="prefix.pxd", least=8.0),
    Floor(
        what="20 ms links, 3 stages, 8 streams, tokens/s vs 0 ms (100m)",
        key="links.100m.20",
        least=0.7,
    ),
)


class Report(msgspec.Struct, kw_only=True):
    """Everything of one run, as it is written to the JSON file. Times in seconds."""

    machine: str
    versions: dict[str, str]
    seconds: dict[str, float]
    rows: list[Row]
    skipped: list[Skipped]


def number(value: float) -> str:
    """Three significant digits, never in exponents."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def lines(rows: Sequence[Row]) -> list[str]:
    """The table: medians, the median of the ratios, and their smallest and greatest."""
    widest = max((len(row.what) for row in rows), default=0)
    found = []
    for row in rows:
        values = row.ratios or row.ours
        spread = f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""
        if row.ratios:
            theirs = number(statistics.median(row.theirs))
            versus = f"{number(statistics.median(row.ours))} vs {theirs}"
            ratio = f"{statistics.median(row.ratios):.2f}x"
        else:
            versus, ratio = number(statistics.median(row.ours)), ""
        what = row.what.ljust(widest)
        found.append(f"  {what}  {versus:>17} {row.unit:<8}  {ratio:>7}  {spread}".rstrip())
    return found


def floor_lines(rows: Sequence[Row]) -> list[str]:
    widest = max(len(floor.what) for floor in FLOORS)
    found = []
    for floor in FLOORS:
        bound = f"≥ {floor.least:g}" if floor.least is not None else f"≤ {floor.most:g}"
        value = floor.measured(rows)
        shown = "-" if value is None else f"{value:.2f}{floor.unit}"
        verdict = floor.verdict(rows)
        line = f"  {floor.what:<{widest}}  {bound + floor.unit:>7}  {shown:>9}  {verdict}"
        found.append(line)
    return found


def machine() -> str:
    return f"{platform.system()} {platform.machine()}"
