"""A node's models: where their files are, what it tells and lends others of them, what it lacks."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path

import trio

from pxd.cluster.plans import Plan
from pxd.p2p.gossip import Gossip
from pxd.p2p.network import Network
from pxd.serving.added import Added
from pxd.serving.held import Held
from pxd.serving.models import Describe, ModelSource, Pin
from pxd.serving.quantizing import Quantize
from pxd.serving.signal import Signal
from pxd.serving.weights.sharing import Sharing


class Shelf:
    """`added` are the models that are to be had here since the last life; `quantized` are those of
    them that `quantize` makes here, with source and bits. `chosen()` are those that the cluster
    serves, `plan()` is the plan in force; `save` writes fields of `identity.State`. While `busy()`,
    requests go first. `changed` is notified when files have come or gone."""

    def __init__(
        self,
        network: Network,
        gossip: Gossip,
        cache: Path,
        describe: Describe,
        *,
        quantize: Quantize | None,
        added: Iterable[str],
        quantized: Mapping[str, tuple[str, int]],
        chosen: Callable[[], Iterable[str]],
        plan: Callable[[], Plan | None],
        save: Callable[..., Awaitable[None]],
        busy: Callable[[], bool],
        changed: Signal,
    ) -> None:
        self._gossip = gossip
        self._plan = plan
        self._changed = changed
        self.sharing = Sharing(
            network,
            cache,
            lambda: gossip.members,
            lambda: gossip.leader,
            busy,
            self._files_changed,
        )
        library = self.sharing.library
        self.models = ModelSource(describe, library, self.sharing.fetch, self._pin)
        self.added = Added(
            added,
            self.models,
            library,
            save,
            self._in_use,
            self._files_changed,
            quantize=quantize,
            recipes=quantized,
        )
        self._held = Held(
            lambda: (*chosen(), *self.added.names),
            library.find,
            lambda models: gossip.update(models=models),
        )

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._held.run, self._changed)
            nursery.start_soon(self.added.run)

    def _pin(self, name: str) -> Pin:
        """What the plan in force means by a model's name."""
        plan = self._plan()
        model = next((model for model in plan.models if model.name == name), None) if plan else None
        return Pin(model.fingerprint, model.revision) if model else Pin()

    def _in_use(self) -> list[str]:
        return [stage.model for stage in self._gossip.record.stages]

    def _files_changed(self) -> None:
        self._held.forget()
        self._changed.notify()
