"""`pxd plan` for a pipe: aligned text, one thing a line, no colour."""

from collections.abc import Mapping

from pxd.cli import plan_words
from pxd.cli.plain import columns
from pxd.cli.plan_report import NodeFigures, Report
from pxd.cli.plan_words import Words, milliseconds
from pxd.cli.words import clean, layers, memory


def render(report: Report, names: Mapping[str, str]) -> str:
    words = Words(report, names)
    nodes = {node.id: node for node in report.nodes}
    lines = [
        f"{clean(report.model.name)}: {plan_words.summary(report)}",
        plan_words.settings(report),
    ]
    if report.reason is None:
        lines.append(plan_words.total(report))
        for number in range(len(report.pipelines)):
            lines += _pipeline(report, number, words, nodes)
    else:
        lines += [f"no pipeline: {clean(report.reason)}", ""]
        lines += columns(
            ("NODE", "MEMORY", "HOLDS AT MOST"),
            [
                (words.name(node.id), memory(node.memory_gib), f"{node.capacity['plain']} layers")
                for node in report.nodes
            ],
        )
    if report.leftovers and report.reason is None:
        lines += ["", *columns(("SPARE", ""), _leftovers(report, words))]
    lines += ["", *_one_more(report, words)]
    return "\n".join(lines) + "\n"


def _pipeline(
    report: Report, number: int, words: Words, nodes: Mapping[str, NodeFigures]
) -> list[str]:
    figures = report.predicted.pipelines[number]
    rows = []
    for stage, times in zip(report.pipelines[number], figures.stages, strict=True):
        node = nodes[stage.node]
        rows.append(
            (
                words.name(stage.node),
                layers(stage.start, stage.end),
                f"{node.used_gib:.1f} of {memory(node.memory_gib)}",
                milliseconds(times.decode_ms),
                milliseconds(times.prefill_ms),
                milliseconds(times.hop_ms),
                "bottleneck" if stage.node == figures.bottleneck else "",
            )
        )
    header = ("NODE", "LAYERS", "MEMORY", "TOKEN", "PROMPT", "HOP", "")
    title = f"pipeline {number + 1}: {plan_words.peak(figures)}; {plan_words.alone(figures)}"
    return ["", title, *columns(header, rows)]


def _leftovers(report: Report, words: Words) -> list[tuple[str, str]]:
    return [(words.name(each.node), words.leftover(each)) for each in report.leftovers]


def _one_more(report: Report, words: Words) -> list[str]:
    if report.one_more.skipped:
        return [f"what one more machine would change: {report.one_more.skipped}"]
    rows = [(words.candidate(each), words.change(each)) for each in report.one_more.candidates]
    return columns(("ONE MORE MACHINE", "WOULD CHANGE"), rows)
