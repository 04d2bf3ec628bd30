"""What the HTTP faces need of the daemon behind them; `pxd.node.Node` is the real one."""

from typing import Protocol

from pxd.doctor.findings import Report
from pxd.serving.added import Added
from pxd.serving.choice import Choices
from pxd.serving.clients import Clients
from pxd.serving.door import Door
from pxd.serving.drain import Drains
from pxd.serving.requests import Ingress
from pxd.serving.status import ClusterStatus
from pxd.serving.view import Planning


class Daemon(Protocol):
    @property
    def ingress(self) -> Ingress: ...

    @property
    def clients(self) -> Clients:
        """Counts the requests of clients here."""

    @property
    def door(self) -> Door:
        """The cluster's keys and bans."""

    @property
    def drains(self) -> Drains:
        """Which nodes take part in plans."""

    @property
    def choices(self) -> Choices:
        """Which models the cluster is to serve."""

    @property
    def added(self) -> Added:
        """Which models are to be had on this node."""

    @property
    def control_token(self) -> str:
        """What a program must show to control this daemon. Never log it."""

    def status(self) -> ClusterStatus: ...

    async def doctor(self) -> Report:
        """Examine this node and its ways to others; takes up to ten seconds."""

    def planning(self) -> Planning | None:
        """What a plan would be made from now; None while no model is planned for."""

    def ticket(self) -> str:
        """The line that lets another machine join. Holds the cluster key: never log it."""

    def stop(self, *, now: bool = False) -> float:
        """Begin to leave; returns at once how many seconds that takes at most.

        With `now` nothing is waited for; it may be called again with it.
        """
