"""What this node does now and how fast, put into its record while that is news."""

from collections.abc import Callable
from typing import Any, Protocol

import trio

from pxd.cluster.records import NodeRecord
from pxd.serving.heads import HeadHost
from pxd.serving.stage import StageHost
from pxd.serving.survey import Survey
from pxd.serving.timings import links_to_publish

LOAD_EVERY_S = 1.0


class Records(Protocol):
    """Where this node's record is kept and told from."""

    @property
    def record(self) -> NodeRecord: ...
    def update(self, **changes: Any) -> None: ...


class LoadReport:
    """Works while `run` runs. `partners()` are the nodes that serve together with this one."""

    def __init__(
        self,
        records: Records,
        heads: HeadHost,
        stages: StageHost,
        survey: Survey,
        partners: Callable[[], frozenset[str]],
    ) -> None:
        self._records = records
        self._heads = heads
        self._stages = stages
        self._survey = survey
        self._partners = partners

    async def run(self) -> None:
        told_at = float("-inf")
        while True:
            await trio.sleep(LOAD_EVERY_S)
            self._stages.publish_figures(self._heads.figures())
            self._stages.tell_blocks(self._heads.blocks())
            self._records.update(
                running=self._heads.running,
                waiting=self._heads.waiting,
                kv_tier=self._heads.kv_tier,
                unfit=self._stages.unfit(),
                slow=self._stages.slow(),
            )
            self._stages.tell_requests(self._heads.loads())
            told, now = self._records.record.links, trio.current_time()
            links = links_to_publish(
                told,
                self._survey.rtts(),
                self._survey.bandwidths(),
                self._partners(),
                since=now - told_at,
            )
            if links is not told:
                told_at = now
                self._records.update(links=links)
            self._stages.follow_links(links)
