"""Machines of their own on one host: network namespaces on a switch, and routers that do NAT.

Needs root, iproute2 and nftables (`apt install iproute2 nftables`). Nothing of the host's own
network is touched: the switch is a bridge in a namespace, too.
"""

import ctypes
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")

_NEWNET = 0x40000000
_TABLE = "inet pxd_netns"
_counter = itertools.count()


def _sh(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nft", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    probe = f"pxd-probe-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if done.returncode:
        return f"`ip netns add` fails: {done.stderr.strip()}"
    _sh("ip", "netns", "del", probe)
    return ""


class Namespace:
    """One network stack. Commands and functions run inside it see nothing else."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.netns = f"pxd{os.getpid()}-{next(_counter)}-{name}"
        self._inside = ThreadPoolExecutor(1, initializer=self.enter)
        _sh("ip", "netns", "add", self.netns)
        for setting in ("ipv6.conf.all.accept_dad=0", "ipv6.conf.default.accept_dad=0"):
            self.sh("sysctl", "-qw", f"net.{setting}")
        self.sh("ip", "link", "set", "lo", "up")

    def command(self, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.netns, *arguments]

    def sh(self, *arguments: str) -> str:
        return _sh(*self.command(*arguments))

    def call(self, function: Callable[..., ResultT], *arguments: Any, **more: Any) -> ResultT:
        """Run `function` in a thread whose sockets belong to this namespace."""
        return self._inside.submit(function, *arguments, **more).result()

    def close(self) -> None:
        self._inside.shutdown()
        subprocess.run(["ip", "netns", "del", self.netns], capture_output=True, check=False)

    def address(self, interface: str, cidr: str) -> None:
        self.sh("ip", "address", "add", cidr, "dev", interface)

    def route(self, via: str) -> None:
        self.sh("ip", "route", "replace", "default", "via", via)

    def limit(self, interface: str, mbit: int) -> None:
        """Send no more than that through the interface, as a slow link does."""
        self.sh("tc", "qdisc", "add", "dev", interface, "root", "tbf",
                "rate", f"{mbit}mbit", "burst", "32kb", "latency", "400ms")  # fmt: skip

    def nft(self, *rules: str) -> None:
        """Add rules such as "incoming ip saddr 10.0.0.2 drop"; there are the chains `incoming`,
        `outgoing` and `passing`, all of which let through what no rule drops."""
        self.sh("nft", "add", "table", *_TABLE.split())
        for chain, hook in (("incoming", "input"), ("outgoing", "output"), ("passing", "forward")):
            spec = f"add chain {_TABLE} {chain} {{ type filter hook {hook} priority 0; }}"
            self.sh("nft", spec)
        for rule in rules:
            self.sh("nft", f"add rule {_TABLE} {rule}")

    def block(self, *others: str) -> None:
        """Hear nothing from these addresses and send them nothing."""
        rules = []
        for other in others:
            family = "ip6" if ":" in other else "ip"
            rules.append(f"incoming {family} saddr {other} drop")
            rules.append(f"outgoing {family} daddr {other} drop")
        self.nft(*rules)

    def lose(self, percent: int) -> None:
        """Lose that share of all that arrives from others."""
        self.nft(f'incoming iifname != "lo" numgen random mod 100 < {percent} drop')

    def heal(self) -> None:
        subprocess.run(
            self.command("nft", "delete", "table", *_TABLE.split()),
            capture_output=True,
            check=False,
        )

    def enter(self) -> None:
        """Move the calling thread in here, for good."""
        _enter(f"/var/run/netns/{self.netns}")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Meanwhile the calling thread is in here, and so is what it starts."""
        # The path alone would name the namespace that the thread is in when it wants to go back.
        descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            self.enter()
            yield
        finally:
            _enter(f"/proc/self/fd/{descriptor}")
            os.close(descriptor)


def _enter(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")
    finally:
        os.close(descriptor)


class Machine(Namespace):
    """A host; usually with an interface `eth0` at `ip` on a switch."""

    ip: str = ""

    @property
    def addresses(self) -> list[str]:
        """All but those of loopback."""
        shown = self.sh("ip", "-json", "address", "show", "up")
        return [
            address["local"]
            for interface in json.loads(shown)
            for address in interface["addr_info"]
            if address["scope"] != "host"
        ]


class Switch(Namespace):
    """A bridge that machines plug into; `subnet` is the first three bytes of a /24."""

    def __init__(self, name: str, subnet: str) -> None:
        super().__init__(name)
        self.subnet = subnet
        self.sh("ip", "link", "add", "br0", "type", "bridge", "mcast_snooping", "0")
        self.sh("ip", "link", "set", "br0", "up")
        self._ports = itertools.count()

    def plug(self, other: Namespace, interface: str, host: int | None, *, prefix: int = 24) -> str:
        """Give `other` an interface here with the address `subnet`.`host`; returns the address.

        Without a host it has none but the link-local one of IPv6.
        """
        port = f"p{next(self._ports)}"
        link(self, port, other, interface)
        self.sh("ip", "link", "set", port, "master", "br0")
        if host is None:
            return ""
        address = f"{self.subnet}.{host}"
        other.address(interface, f"{address}/{prefix}")
        return address


class Network:
    """Builds namespaces and takes them all down again."""

    def __init__(self) -> None:
        self._made: list[Namespace] = []

    def switch(self, name: str, subnet: str) -> Switch:
        switch = Switch(name, subnet)
        self._made.append(switch)
        return switch

    def bare(self, name: str) -> Machine:
        """A machine without any interface."""
        machine = Machine(name)
        self._made.append(machine)
        return machine

    def machine(self, name: str, switch: Switch, host: int, *, gateway: str = "") -> Machine:
        machine = self.bare(name)
        machine.ip = switch.plug(machine, "eth0", host)
        # mDNS wants a way for 224.0.0.0/4 even where there is no default route.
        machine.sh("ip", "route", "add", "224.0.0.0/4", "dev", "eth0")
        if gateway:
            machine.route(gateway)
        return machine

    def router(
        self, name: str, inner: Switch, outer: Switch, outer_host: int, *, symmetric: bool = False
    ) -> Namespace:
        """Masquerades `inner` behind `outer`.`outer_host` and lets nothing in that was not asked
        for, as a home router does; its inner address ends in .1. It keeps port numbers, or, if
        `symmetric`, gives every connection one that nobody can guess."""
        router = Namespace(name)
        self._made.append(router)
        inner.plug(router, "lan", 1)
        outer.plug(router, "wan", outer_host)
        router.sh("sysctl", "-qw", "net.ipv4.ip_forward=1")
        router.sh("nft", "add table ip nat")
        router.sh("nft", "add chain ip nat post { type nat hook postrouting priority 100; }")
        ports = "masquerade random,fully-random" if symmetric else "masquerade"
        router.sh("nft", f'add rule ip nat post oifname "wan" {ports}')
        router.nft(
            'passing iifname "wan" ct state established,related accept',
            'passing iifname "wan" drop',
            'incoming iifname "wan" ct state established,related accept',
            'incoming iifname "wan" drop',
        )
        return router

    def close(self) -> None:
        for namespace in reversed(self._made):
            namespace.close()


def link(one: Namespace, its: str, other: Namespace, theirs: str) -> None:
    """Join two namespaces by a cable."""
    _sh("ip", "link", "add", its, "netns", one.netns, "type", "veth",
        "peer", "name", theirs, "netns", other.netns)  # fmt: skip
    one.sh("ip", "link", "set", its, "up")
    other.sh("ip", "link", "set", theirs, "up")


@contextmanager
def network() -> Iterator[Network]:
    made = Network()
    try:
        yield made
    finally:
        made.close()


@contextmanager
def homes(*symmetric: bool) -> Iterator[tuple[list[Machine], list[Machine]]]:
    """A machine at home for each of `symmetric`, behind a router of that kind, and two machines
    that all of them can reach."""
    with network() as made:
        world = made.switch("world", "198.51.100")
        private = []
        for n, random_ports in enumerate(symmetric, 1):
            home = made.switch(f"home{n}", f"192.168.{n}")
            made.router(f"r{n}", home, world, n, symmetric=random_ports)
            private.append(made.machine(f"m{n}", home, 2, gateway=f"192.168.{n}.1"))
        yield private, [made.machine(f"pub{n}", world, 100 + n) for n in (1, 2)]


@contextmanager
def lan(names: Sequence[str]) -> Iterator[list[Machine]]:
    """Machines on one switch, at 10.77.0.2 and on."""
    with network() as made:
        switch = made.switch("sw", "10.77.0")
        yield [made.machine(name, switch, host) for host, name in enumerate(names, 2)]


def wait_home(within: float = 30.0) -> None:
    """Return when no thread of this process is in a namespace any more.

    Trio keeps idle threads for some seconds, for whichever loop wants one next, and a thread stays
    in the namespace that it was begun in: a process started there would find nobody on loopback.
    """
    home = os.readlink("/proc/self/ns/net")
    end = time.monotonic() + within
    while any(place != home for place in _namespaces_of_threads()):
        assert time.monotonic() < end, "a thread stays in a namespace"
        time.sleep(0.1)


def _namespaces_of_threads() -> Iterator[str]:
    for task in os.listdir("/proc/self/task"):
        # A thread may end meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            yield os.readlink(f"/proc/self/task/{task}/ns/net")


def partition(*groups: Sequence[Machine]) -> None:
    """Cut every group off from all others."""
    for group in groups:
        strangers = [
            address
            for other in groups
            if other is not group
            for machine in other
            for address in machine.addresses
        ]
        for machine in group:
            machine.block(*strangers)
