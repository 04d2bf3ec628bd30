"""One run: a cluster, its clients, the faults, and what is left when all is over."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from scripts.benchmarks import models
from scripts.benchmarks.bench import say
from scripts.benchmarks.errors import BenchError
from scripts.disorder.clients import Clients, learn
from scripts.disorder.cluster import NAMES, Cluster
from scripts.disorder.faults import Disorder
from scripts.disorder.ground import Ground
from scripts.disorder.leaks import holding, quiet
from scripts.disorder.questions import questions
from scripts.disorder.report import Report, spread
from scripts.disorder.schedule import CAPACITIES, LAYERS, Fault, Kind, schedule

SETTLE_S = 90.0
TOLD_EVERY_S = 20.0


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be run."""

    seed: int
    minutes: float
    nodes: int
    clients: int

    @property
    def names(self) -> Sequence[str]:
        return NAMES[: self.nodes]

    def faults(self, kinds: Sequence[Kind]) -> tuple[Fault, ...]:
        return schedule(self.seed, 60 * self.minutes, CAPACITIES[self.nodes], LAYERS, kinds)


async def run(wanted: Wanted, ground: Ground, root: Path) -> Report:
    """Raises `BenchError` if there is no cluster to begin with."""
    other_model = models.model("tiny", root)
    cluster = Cluster(root, ground.spots, CAPACITIES[wanted.nodes])
    try:
        return await _run(wanted, ground, cluster, other_model)
    finally:
        cluster.stop()


async def _run(wanted: Wanted, ground: Ground, cluster: Cluster, other_model: Path) -> Report:
    say(f"==> {wanted.nodes} nodes; logs are in {cluster.root}")
    await cluster.start()
    if amiss := await cluster.settle(SETTLE_S):
        raise BenchError(f"the cluster does not form: {amiss}")
    right = await learn(cluster.nodes[0], questions())
    before = {node.name: holding(node) for node in cluster.nodes}
    faults = wanted.faults(ground.kinds)
    for kind, why in ground.missing.items():
        say(f"    left out: {kind}: {why}")
    say(f"==> {wanted.clients} clients, {len(faults)} faults in {wanted.minutes:g} minutes")
    began = trio.current_time()
    clients = Clients(cluster, right, wanted.seed, began)
    disorder = Disorder(cluster, ground, other_model, began)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(cluster.watch)
        nursery.start_soon(_tell, clients, began)
        async with trio.open_nursery() as asking:
            for number in range(wanted.clients):
                asking.start_soon(clients.run, number)
            await disorder.run(faults)
            await trio.sleep_until(began + 60 * wanted.minutes)
            clients.over.set()
            say("==> no more faults, no more requests")
        amiss = await cluster.settle(SETTLE_S)
        left = await quiet(cluster, before)
        nursery.cancel_scope.cancel()
    return _report(wanted, ground, cluster, clients, disorder, amiss, left)


async def _tell(clients: Clients, began: float) -> None:
    while True:
        await trio.sleep(TOLD_EVERY_S)
        tally = clients.tally
        counts = ", ".join(f"{count} {outcome}" for outcome, count in tally.outcomes.items())
        say(f"{trio.current_time() - began:7.1f} s  {tally.sent} requests: {counts}")


def _report(
    wanted: Wanted,
    ground: Ground,
    cluster: Cluster,
    clients: Clients,
    disorder: Disorder,
    amiss: str,
    left: list[str],
) -> Report:
    tally = clients.tally
    return Report(
        seed=wanted.seed,
        minutes=wanted.minutes,
        nodes=wanted.nodes,
        clients=wanted.clients,
        missing=ground.missing,
        faults=disorder.done,
        sent=tally.sent,
        finished=tally.outcomes["finished"],
        resumed=tally.resumed,
        recoveries=cluster.recoveries(),
        elsewhere=tally.elsewhere,
        errors=dict(tally.errors),
        cuts=dict(tally.cuts),
        failed=tally.of("error"),
        wrong=tally.of("wrong"),
        lost=tally.of("lost"),
        pauses=spread(tally.pauses),
        firsts=spread(tally.firsts),
        longest=tally.longest,
        longest_frozen=round(tally.longest_frozen, 3),
        leaks=left,
        amiss=amiss,
        fallen=cluster.fallen,
        failures=disorder.failures,
    )
