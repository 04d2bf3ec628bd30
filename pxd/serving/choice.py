"""Which models the cluster serves: a register that every record carries, the last writer wins."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Protocol

import msgspec
import trio

from pxd import identity
from pxd.cluster.members import Member
from pxd.cluster.records import MAX_CHOSEN, ModelChoice, NodeRecord
from pxd.cluster.stamps import ceiling
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.errors import ModelError
from pxd.serving.signal import Signal
from pxd.settings import DEFAULT_MODEL

log = logging.getLogger("pxd.serving.choice")

SAVE_AGAIN_S = 10.0
"""After this a choice that could not be stored is stored again, whatever happens meanwhile."""


class ChoiceError(Exception):
    """Models cannot be chosen like that; `code` is one word, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Chosen(msgspec.Struct, frozen=True):
    """What the cluster is to serve after a choice. `model` is the full name of the one that it was
    about; `changed` unless that was so before. `outgoing` end once the others are served."""

    model: str
    names: list[str]
    outgoing: list[str]
    changed: bool


def latest_choice(choices: Iterable[ModelChoice | None], most: int) -> ModelChoice:
    """The greatest choice with a stamp of at most `most`, for which see `pxd.cluster.stamps`; with
    none at all, the bundled demo model at stamp 0."""
    default = ModelChoice(0, "", (DEFAULT_MODEL,))
    return max((choice for choice in choices if choice and choice.stamp <= most), default=default)


def use(current: ModelChoice, by: str, name: str, *, only: bool = False) -> ModelChoice:
    """A choice that supersedes `current`, or `current` itself if it says just that already.

    With `only`, what was chosen before ends once `name` is served. Raises `ChoiceError`.
    """
    before = tuple(dict.fromkeys(current.names))
    names = (name,) if only else (*(other for other in before if other != name), name)
    if name in before and (not only or before == names) and current.stamp > 0:
        return current
    if not only and name in before:
        names = before
    if len(names) > MAX_CHOSEN:
        message = f"the cluster serves {MAX_CHOSEN} models at most; `pxd models stop` one of them"
        raise ChoiceError("full", message)
    ending = dict.fromkeys((*(before if only else ()), *current.outgoing))
    outgoing = tuple(other for other in ending if other not in names)[:MAX_CHOSEN]
    return ModelChoice(current.stamp + 1, by, names, outgoing)


def stop(current: ModelChoice, by: str, name: str) -> ModelChoice:
    """A choice without a model, which people may name by its last part. Raises `ChoiceError`."""
    chosen = tuple(dict.fromkeys((*current.names, *current.outgoing)))
    found = called(name, chosen)
    if found is None:
        listed = ", ".join(chosen) or "none"
        message = f"the cluster does not serve {name!r}; it serves {listed}"
        raise ChoiceError("unknown_model", message)
    names = tuple(other for other in current.names if other != found)
    outgoing = tuple(other for other in current.outgoing if other != found) if names else ()
    return ModelChoice(current.stamp + 1, by, names, outgoing)


def called(name: str, models: Iterable[str]) -> str | None:
    """The model of that name; a directory or hub id may be named by its last part alone."""
    known = list(models)
    last = (model for model in known if name == model.rstrip("/").rpartition("/")[2])
    return name if name in known else next(last, None)


class Records(Protocol):
    """Where this node's record is kept, and those of others."""

    @property
    def record(self) -> NodeRecord: ...
    @property
    def members(self) -> Mapping[str, Member]: ...
    def update(self, **changes: Any) -> None: ...


class Choices:
    """This node's part in it. `asked` is the model that it was started to serve, and `save` writes
    fields of `identity.State`; `describe` raises if there is no such model."""

    def __init__(
        self,
        records: Records,
        save: Callable[..., Awaitable[None]],
        describe: Callable[[str], Awaitable[object]],
        asked: str | None,
        clock: Callable[[], float],
    ) -> None:
        self._records = records
        self._save = save
        self._describe = describe
        self._asked = asked
        self._clock = clock

    @property
    def current(self) -> ModelChoice:
        choices = (member.record.choice for member in self._records.members.values())
        return latest_choice(choices, ceiling(self._clock()))

    def follow(self) -> None:
        """Look at the records anew: is there a later choice?"""
        own, choice = self._records.record, self.current
        if self._asked is not None and own.seniority > 0:
            # Whoever starts again with the same option stops nothing that came since.
            if self._asked not in choice.names or choice.stamp == 0:
                choice = use(choice, own.id, self._asked, only=True)
            self._asked = None
        if choice.stamp > 0 and choice != own.choice:
            self._records.update(choice=choice)

    async def use(self, name: str, *, only: bool = False) -> Chosen:
        """Have the cluster serve a model. Raises `ChoiceError`, also when there is no such."""
        self._check_settled()
        name = called(name, self.current.names) or name
        try:
            await self._describe(name)
        except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
            raise ChoiceError("bad_model", f"{name} cannot be served: {error}") from error
        return self._choose(name, use(self.current, self._records.record.id, name, only=only))

    async def stop(self, name: str) -> Chosen:
        """Have the cluster serve a model no more. Raises `ChoiceError`."""
        self._check_settled()
        current = self.current
        chosen = stop(current, self._records.record.id, name)
        full = called(name, (*current.names, *current.outgoing)) or name
        return self._choose(full, chosen)

    def _check_settled(self) -> None:
        if self._records.record.seniority == 0:
            message = "this node is still looking for its cluster; try again in a few seconds"
            raise ChoiceError("not_settled", message)

    def _choose(self, model: str, choice: ModelChoice) -> Chosen:
        changed = choice != self.current
        if changed:
            log.info("the cluster is to serve %s", ", ".join(choice.names) or "no model")
            self._records.update(choice=choice)
        return Chosen(model, list(choice.names), list(choice.outgoing), changed)

    async def run(self, changed: Signal) -> None:
        """Remember the latest choice across restarts, until cancelled."""
        while True:
            event = changed.event
            choice = self._records.record.choice
            if choice is not None:
                try:
                    await self._save(choice=None, models=to_state(choice))
                except OSError as error:
                    log.error("cannot remember the chosen models: %s", error)
                    # Not with the next change: there are several in a second.
                    await trio.sleep(SAVE_AGAIN_S)
                    continue
            await event.wait()


def to_state(choice: ModelChoice) -> identity.Models:
    return choice.stamp, choice.by, choice.names, choice.outgoing


def from_state(state: identity.State) -> ModelChoice | None:
    if state.models is not None:
        return ModelChoice(*state.models)
    if state.choice is None:
        return None
    stamp, by, name = state.choice
    return ModelChoice(stamp, by, (name,))
