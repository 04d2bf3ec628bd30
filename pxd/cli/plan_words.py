"""The words in which `pxd plan` puts its answer, drawn or plain."""

from collections.abc import Mapping

from pxd.cli.plan_report import Candidate, Leftover, PipelineFigures, Report
from pxd.cli.words import clean, layers, memory


class Words:
    """Knows what people call the nodes."""

    def __init__(self, report: Report, names: Mapping[str, str]) -> None:
        self._names = names
        self._fits = report.reason is None
        self._now = len(report.pipelines)

    def name(self, node: str) -> str:
        return clean(self._names.get(node, node))

    def leftover(self, leftover: Leftover) -> str:
        if leftover.start is None or leftover.end is None:
            return "holds nothing that would be of use"
        return f"can stand in for {layers(leftover.start, leftover.end)}"

    def candidate(self, candidate: Candidate) -> str:
        return clean(candidate.machine) or f"another like {self.name(candidate.like or '')}"

    def change(self, candidate: Candidate) -> str:
        """What the candidate would change."""
        if candidate.missing_gib is not None:
            return f"still {memory(candidate.missing_gib)} missing"
        rate = f"{tokens(candidate.tokens_per_s)} tokens/s"
        if not self._fits:
            return f"fits, {rate}"
        before = candidate.tokens_per_s - candidate.gain
        percent = round(100 * candidate.gain / before) if before else 0
        change = f"{percent:+d}%" if percent else "no more than now"
        second = (
            f", {candidate.pipelines} pipelines" if candidate.pipelines > 1 == self._now else ""
        )
        return f"{rate} ({change}{second})"


def summary(report: Report) -> str:
    model = report.model
    parts = f"{model.layers} layers" if model.layers > 1 else "1 layer"
    return f"{parts}, {memory(model.weight_gib)} of weights"


def settings(report: Report) -> str:
    chosen = report.settings
    return (
        f"strategy {chosen.strategy}, weights {chosen.param_ratio:.0%} and KV "
        f"{chosen.kv_ratio:.0%} of memory, prompts of {chosen.prompt_tokens} tokens"
    )


def total(report: Report) -> str:
    count = len(report.pipelines)
    pipelines = f"{count} pipelines" if count > 1 else "1 pipeline"
    return f"{pipelines}, {tokens(report.predicted.tokens_per_s)} tokens/s at most"


def peak(figures: PipelineFigures) -> str:
    requests = f"{figures.requests} requests" if figures.requests != 1 else "1 request"
    return f"{tokens(figures.tokens_per_s)} tokens/s with {requests} at once"


def alone(figures: PipelineFigures) -> str:
    first, each = milliseconds(figures.ttft_ms), milliseconds(figures.token_ms)
    return f"one request alone: first token after {first}, then {each} per token"


def tokens(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"


def milliseconds(ms: float) -> str:
    if ms >= 1000:
        return f"{ms / 1000:.2f} s" if ms < 10_000 else f"{ms / 1000:.0f} s"
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.1f} ms" if ms >= 1 else f"{ms:.2f} ms"
