"""The examination in the daemon: everything that takes time at once, then judged in order."""

import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import trio

from pxd.cluster.members import Member
from pxd.doctor import (
    clocks,
    daemon,
    door,
    engines,
    findings,
    firewall,
    links,
    loops,
    machine,
    multicast,
    opening,
    reach,
    versions,
)
from pxd.doctor.facts import DoctorNetwork, Facts, gather
from pxd.doctor.findings import Finding, Report
from pxd.doctor.interfaces import interfaces
from pxd.p2p.clock import CLOCK, Clock
from pxd.p2p.reach import DIAL, Reach
from pxd.serving.status import ClusterStatus
from pxd.settings import Settings

log = logging.getLogger("pxd.doctor")

DEADLINE_S = 9.0
"""For everything that has to be waited for; the answer is there within 10 s."""

ValueT = TypeVar("ValueT")


class Part(Generic[ValueT]):
    """Something to wait for. `value` stays None if it takes too long or fails."""

    def __init__(self, name: str, get: Callable[[], Awaitable[ValueT]]) -> None:
        self._name = name
        self._get = get
        self.value: ValueT | None = None

    async def run(self) -> None:
        try:
            self.value = await self._get()
        except Exception:
            # One test that fails must not cost the person all the others.
            log.exception("the doctor's test of %s failed; this is a bug in pxd", self._name)


async def in_thread(call: Callable[[], ValueT]) -> ValueT:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


async def finish(*parts: Part[Any], within: float) -> None:
    """Run all at once, for `within` seconds at most."""
    with trio.move_on_after(within):
        async with trio.open_nursery() as nursery:
            for part in parts:
                nursery.start_soon(part.run)


def judged(*checks: tuple[str, Callable[[], Sequence[Finding]]]) -> tuple[Finding, ...]:
    """All findings in the order of `checks`; one that fails says so in its place."""
    found: list[Finding] = []
    for name, check in checks:
        try:
            found += check()
        except Exception:
            log.exception("the doctor's check of %s failed; this is a bug in pxd", name)
            text = "this check failed itself, which is a bug in pxd; the log says more"
            found.append(findings.note(name, text))
    return tuple(found)


def report(
    node: str, version: str, found: tuple[Finding, ...], *, daemon: bool, began: float
) -> Report:
    """`began` in seconds of `time.monotonic`."""
    return Report(
        node=node,
        version=version,
        daemon=daemon,
        healthy=all(each.level != "problem" for each in found),
        seconds=round(time.monotonic() - began, 2),
        findings=found,
    )


class Doctor:
    """Examines this node when asked, and helps others to examine themselves: it serves their
    requests to dial back and to tell the time. `models()` names those the cluster is to serve."""

    def __init__(
        self,
        network: DoctorNetwork,
        members: Callable[[], Mapping[str, Member]],
        status: Callable[[], ClusterStatus],
        models: Callable[[], list[str]],
        settings: Settings,
    ) -> None:
        self._network = network
        self._members = members
        self._status = status
        self._models = models
        self._settings = settings
        self._clock = Clock()
        self._lock = trio.Lock()
        dialling = Reach(network.identity, self._addresses_of, network.host_of)
        network.serve(DIAL, dialling.serve)
        network.serve(CLOCK, self._clock.serve)

    def _addresses_of(self, peer: str) -> tuple[str, ...]:
        member = self._members().get(peer)
        return member.record.addresses if member and member.live else ()

    async def examine(self) -> Report:
        """Takes `DEADLINE_S` and a little at most; one examination at a time."""
        async with self._lock:
            began = time.monotonic()
            facts = gather(
                self._network,
                self._members(),
                self._status(),
                self._settings,
                await in_thread(interfaces),
                now=time.time(),
                clock=trio.current_time(),
            )
            found = await self._findings(facts)
            name, version = facts.own.name, facts.status.version
            return report(name, version, found, daemon=True, began=began)

    async def _findings(self, facts: Facts) -> tuple[Finding, ...]:
        ports = firewall.ports_of(*facts.ports)
        device = facts.own.device
        # A graphics card's own memory is not what other programs fill.
        offered = None if device and device.kind in ("cuda", "rocm") else facts.own.memory
        look = partial(machine.look, facts.settings.data_dir, offered)
        walls = Part("firewalls", partial(firewall.detect, ports))
        asked = Part("reach", partial(reach.ask, self._network, facts))
        loop = Part("multicast", partial(loops.test_all, facts.interfaces))
        clock = Part("clocks", partial(clocks.compare, self._clock, self._network, facts.connected))
        room = Part("the machine", partial(in_thread, look))
        look_for = partial(versions.files, self._models(), versions.lenders(facts))
        files = Part("model files", partial(in_thread, look_for))
        await finish(walls, asked, loop, clock, room, files, within=DEADLINE_S)
        reached = reach.reached(asked.value)
        return judged(
            ("daemon", lambda: daemon.daemon(facts)),
            ("model", lambda: daemon.model(facts)),
            ("reach", lambda: reach.reach(facts, asked.value, walls.value)),
            ("firewall", lambda: opening.firewall(walls.value, reached, ports[0])),
            ("multicast", lambda: multicast.multicast(facts, loop.value, walls.value)),
            ("cluster-key", lambda: door.door(facts)),
            ("version", lambda: versions.versions(facts)),
            ("model-files", lambda: [*versions.models(facts), *(files.value or ())]),
            ("clock", lambda: clocks.clocks(facts, clock.value)),
            ("links", lambda: links.links(facts)),
            ("disk", lambda: machine.disk(room.value)),
            ("memory", lambda: machine.memory(room.value)),
            ("executor", lambda: engines.executors(device)),
        )
