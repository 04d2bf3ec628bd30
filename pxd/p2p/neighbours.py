"""Discovery on the local network for as long as the node runs: started anew when the machine moves
or the key changes, and telling a person once what is in the way."""

import ipaddress
import logging
from collections.abc import Callable

import trio

from pxd.p2p.admission import Admission
from pxd.p2p.interfaces import Local
from pxd.p2p.mdns import Heard, Mdns, MulticastFailed
from pxd.p2p.roaming import INTERVAL, Roaming
from pxd.p2p.sightings import Sightings

log = logging.getLogger("pxd.p2p")

LOOK_AGAIN = 5.0
"""Seconds after which what failed is tried again, and the key is looked at."""


class Neighbours:
    """`hosts()` are the addresses to announce, `heard` takes the announcements of members."""

    def __init__(
        self,
        peer_id: str,
        admission: Admission,
        roaming: Roaming,
        hosts: Callable[[], list[str]],
        heard: Callable[[Heard], None],
    ) -> None:
        self._peer_id = peer_id
        self._admission = admission
        self._roaming = roaming
        self._hosts = hosts
        self._heard = heard
        self._said_foreign = False
        self.sightings = Sightings()

    async def run(self, port: int) -> None:
        while True:
            hosts, [key, *_] = self._hosts(), self._admission.keys()
            moved = self._roaming.moved
            speak_at = interfaces_to_use(hosts, self._roaming.locals)
            async with trio.open_nursery() as nursery:
                mdns = Mdns(self._peer_id, self._admission.keys, port, hosts, speak_at)
                nursery.start_soon(self._speak, mdns)
                # A machine that changes networks, or keys, is to be found under the new ones.
                while not moved.is_set() and self._admission.keys()[0] == key:
                    with trio.move_on_after(LOOK_AGAIN):
                        await moved.wait()
                    if self.sightings.problem:
                        break
                nursery.cancel_scope.cancel()

    async def _speak(self, mdns: Mdns) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(mdns.run, self._hear)
                self.sightings.problem = ""
        except* MulticastFailed as group:
            await self._failed(str(group.exceptions[0]))

    async def _failed(self, problem: str) -> None:
        moved = self._roaming.moved
        with trio.move_on_after(2 * INTERVAL):
            # An interface that is just going away, most likely.
            await moved.wait()
            return
        if problem != self.sightings.problem:
            log.warning(
                "cannot look for other nodes on the local network (%s); "
                "join machines with `pxd start --join TICKET` instead",
                problem,
            )
        self.sightings.problem = problem

    def _hear(self, heard: Heard) -> None:
        addresses = tuple(map(str, heard.addresses))
        if heard.kind == "gone":
            self.sightings.gone(heard.peer)
        elif heard.kind == "member":
            self.sightings.member(heard.peer, addresses)
            self._heard(heard)
        else:
            self.sightings.stranger(heard.peer, addresses)
            if not self._said_foreign and heard.addresses:
                self._said_foreign = True
                log.warning(
                    "a pxd node with another cluster key is on this network, at %s; if the two "
                    "belong together, `pxd ticket` on one of them prints what `pxd start --join "
                    "TICKET` on the other one needs",
                    heard.addresses[0].host,
                )


def interfaces_to_use(hosts: list[str], among: tuple[Local, ...]) -> list[str]:
    """Of `hosts`, those to do multicast from: all of IPv4, and one of IPv6 per interface."""
    interface_of = {local.host: local.interface for local in among}
    taken: set[str] = set()
    chosen = []
    for host in hosts:
        interface = interface_of.get(host, host)
        if ipaddress.ip_address(host).version == 4:
            chosen.append(host)
        elif interface not in taken:
            taken.add(interface)
            chosen.append(host)
    return chosen
