"""Which model the cluster serves: a register that every record carries, the last writer wins."""

from collections.abc import Iterable

from pxd.cluster.records import ModelChoice
from pxd.settings import DEFAULT_MODEL


def latest_choice(choices: Iterable[ModelChoice | None], most: int) -> ModelChoice:
    """The greatest choice with a stamp of at most `most`, for which see `pxd.cluster.stamps`; with
    none at all, the bundled demo model at stamp 0."""
    default = ModelChoice(0, "", DEFAULT_MODEL)
    return max((choice for choice in choices if choice and choice.stamp <= most), default=default)


def choose(current: ModelChoice, by: str, name: str) -> ModelChoice:
    """A choice that supersedes `current`, or `current` itself if it names that model already."""
    if current.name == name and current.stamp > 0:
        return current
    return ModelChoice(current.stamp + 1, by, name)
