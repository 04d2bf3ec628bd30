"""What a run came to, as text and for programs. Pure."""

import msgspec

from scripts.disorder.faults import Done
from scripts.disorder.schedule import Kind
from scripts.disorder.tally import RESUMED_S, Ending, Pause, quantile


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Of waits, in seconds."""

    count: int
    p50: float
    p99: float
    longest: float


def spread(values: list[float]) -> Spread:
    return Spread(
        count=len(values),
        p50=round(quantile(values, 0.5), 4),
        p99=round(quantile(values, 0.99), 4),
        longest=round(max(values, default=0.0), 3),
    )


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`amiss` says why the cluster did not come to rest at the end, `fallen` which daemons ended
    by themselves, `failures` which faults could not be carried out or undone, `failed` which
    requests ended with a proper error. `recoveries` are how many times a request went on after a
    failure, as the daemons tell. `missing`: kinds of faults that cannot be had here, and why.
    `elsewhere`: sent to another node than the client's own.
    """

    seed: int
    minutes: float
    nodes: int
    clients: int
    missing: dict[Kind, str]
    faults: list[Done]
    sent: int
    finished: int
    resumed: int
    recoveries: int
    elsewhere: int
    errors: dict[str, int]
    cuts: dict[str, int]
    failed: list[Ending]
    wrong: list[Ending]
    lost: list[Ending]
    pauses: Spread
    firsts: Spread
    longest: list[Pause]
    longest_frozen: float
    leaks: list[str]
    amiss: str
    fallen: list[str]
    failures: list[str]

    @property
    def passed(self) -> bool:
        trouble = (self.wrong, self.lost, self.leaks, self.amiss, self.fallen, self.failures)
        return not any(trouble)


def lines(report: Report) -> list[str]:
    pauses, firsts = report.pauses, report.firsts
    found = [
        f"seed {report.seed}: {report.nodes} nodes, {report.clients} clients, "
        f"{report.minutes:g} minutes, {len(report.faults)} faults",
        f"  sent       {report.sent}, of which {report.elsewhere} to another node than usual",
        f"  finished   {report.finished}",
        f"  resumed    {report.resumed} paused for more than {RESUMED_S:g} s and went on; "
        f"the daemons' logs tell of {report.recoveries} recoveries",
        _counted("error", report.errors),
        _counted("cut", report.cuts),
        f"  wrong      {len(report.wrong)}",
        f"  lost       {len(report.lost)}",
        f"  pauses     p50 {1e3 * pauses.p50:.0f} ms, p99 {1e3 * pauses.p99:.0f} ms, "
        f"longest {pauses.longest:.1f} s; {report.longest_frozen:.1f} s at a frozen node",
        *(
            f"             {pause.seconds:.1f} s until {pause.at:.1f} s, client {pause.client} "
            f"at {pause.node}"
            for pause in report.longest
            if pause.seconds > RESUMED_S
        ),
        f"  first text p50 {1e3 * firsts.p50:.0f} ms, p99 {1e3 * firsts.p99:.0f} ms, "
        f"longest {firsts.longest:.1f} s",
        f"  leaks      {len(report.leaks)}",
    ]
    found += [f"  left out   {kind}: {why}" for kind, why in report.missing.items()]
    found += [_notable(ending) for ending in (*report.failed, *report.wrong, *report.lost)]
    found += [f"  leak: {leak}" for leak in report.leaks]
    found += [f"  fallen: {daemon}" for daemon in report.fallen]
    found += [f"  fault: {failure}" for failure in report.failures]
    found += [f"  not at rest at the end: {report.amiss}"] if report.amiss else []
    return found


def _counted(name: str, kinds: dict[str, int]) -> str:
    shown = "; ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return f"  {name:<10} {sum(kinds.values())}" + (f": {shown}" if shown else "")


def _notable(ending: Ending) -> str:
    return (
        f"  {ending.outcome} at {ending.at:.1f} s: client {ending.client} at {ending.node}, "
        f"{ending.question}: {ending.why}"
    )
