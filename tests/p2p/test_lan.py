"""Machines with several interfaces, without IPv4, and that change addresses while they run."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.netns import Machine, Network, needs_netns, network

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_netns]

KEY = "6b" * 32
Seen = dict[str, Any]


class Node:
    """A process of `lan_node` on a machine, and what it said last."""

    def __init__(self, machine: Machine, root: Path, seed: int, key: str = KEY) -> None:
        self.name = machine.name
        self.machine = machine
        self.seen: Seen = {}
        self._log = root / f"{self.name}.log"
        self._lines: queue.Queue[Seen] = queue.Queue()
        command = [sys.executable, "-m", "tests.p2p.lan_node", str(root / self.name)]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                machine.command(*command, str(seed), key),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def until(self, condition: Callable[[Seen], bool], within: float = 30.0) -> None:
        """Wait until what the node says meets `condition`."""
        deadline = time.monotonic() + within
        while not (self.seen and condition(self.seen)):
            try:
                self.seen = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                log = self._log.read_text()[-3000:]
                raise AssertionError(f"{self.name} sees {self.seen}; {log}") from None

    @property
    def log(self) -> str:
        return self._log.read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def nodes(root: Path, *machines: Machine, keys: tuple[str, ...] = ()) -> Iterator[list[Node]]:
    started: list[Node] = []
    try:
        for number, machine in enumerate(machines):
            key = keys[number] if keys else KEY
            started.append(Node(machine, root, number + 1, key))
        yield started
    finally:
        for node in started:
            node.end()


def alive_at(name: str, host: str) -> Callable[[Seen], bool]:
    """Connected with `name`, with `host` at its end of the connection."""
    return lambda seen: (
        seen["states"].get(name) == "alive" and (seen["hosts"][name] or "").startswith(host)
    )


def hosts(seen: Seen, name: str) -> list[str]:
    return [address.split("/")[2] for address in seen["addresses"].get(name, ())]


class Laptops:
    """Two machines that are joined by Thunderbolt, Ethernet and Wi-Fi."""

    def __init__(self, made: Network) -> None:
        thunderbolt = made.switch("tb", "169.254.7")
        ethernet, wireless = made.switch("eth", "10.77.0"), made.switch("air", "10.78.0")
        self.machines = []
        for host, name in enumerate(("ann", "bob"), 2):
            machine = made.machine(name, ethernet, host)
            wireless.plug(machine, "wlan0", host)
            thunderbolt.plug(machine, "thunderbolt0", host, prefix=16)
            for inner, address in (("docker0", "172.17.0.1/16"), ("eth9", "10.99.0.1/24")):
                machine.sh("ip", "link", "add", inner, "type", "bridge")
                machine.address(inner, address)
            machine.sh("ip", "link", "set", "docker0", "up")
            self.machines.append(machine)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    with network() as made:
        laptops = Laptops(made)
        with nodes(tmp_path_factory.mktemp("laptops"), *laptops.machines) as started:
            yield started


def test_all_useful_addresses_are_told_and_the_fastest_way_is_taken(two: list[Node]) -> None:
    ann, bob = two
    ann.until(alive_at("bob", "169.254.7.3"))
    bob.until(alive_at("ann", "169.254.7.2"))
    bob.until(lambda seen: len(hosts(seen, "ann")) == 6)
    told = hosts(bob.seen, "ann")
    assert told[:3] == ["10.77.0.2", "10.78.0.2", "169.254.7.2"]
    assert all(host.startswith("fe80::") and "%" not in host for host in told[3:])


def test_another_way_is_taken_while_an_interface_is_down(two: list[Node]) -> None:
    ann, bob = two
    ann.machine.sh("ip", "link", "set", "thunderbolt0", "down")
    began = time.monotonic()
    for node, other in ((ann, "bob"), (bob, "ann")):
        node.until(alive_at(other, "10.77.0."), within=15)
    print(f"another way after {time.monotonic() - began:.1f} s")
    bob.until(lambda seen: "169.254.7.2" not in hosts(seen, "ann"), within=10)
    ann.machine.sh("ip", "link", "set", "thunderbolt0", "up")
    for node, other in ((ann, "bob"), (bob, "ann")):
        node.until(alive_at(other, "169.254.7."), within=15)
    assert ann.seen["deaths"] == bob.seen["deaths"] == 0
    for interface in ("wlan0", "thunderbolt0"):
        for node in two:
            node.machine.sh("ip", "link", "set", interface, "down")
    bob.until(lambda seen: len(hosts(seen, "ann")) == 2, within=10)


def test_a_new_address_is_used_and_known_everywhere_within_seconds(two: list[Node]) -> None:
    ann, bob = two
    ann.machine.sh("ip", "address", "flush", "dev", "eth0")
    ann.machine.address("eth0", "10.77.0.52/24")
    began = time.monotonic()
    bob.until(alive_at("ann", "10.77.0.52"), within=15)
    bob.until(lambda seen: hosts(seen, "ann") == ["10.77.0.52"], within=15)
    print(f"at the new address after {time.monotonic() - began:.1f} s")
    ann.until(alive_at("bob", "10.77.0.3"), within=15)


def test_after_sleep_in_another_place_a_node_comes_back_at_once(two: list[Node]) -> None:
    ann, bob = two
    ann.process.send_signal(signal.SIGSTOP)
    bob.until(lambda seen: seen["states"].get("ann") == "dead", within=30)
    slept = time.monotonic()
    ann.machine.sh("ip", "address", "flush", "dev", "eth0")
    ann.machine.address("eth0", "10.77.0.77/24")
    # Long enough that bob's attempts are far apart.
    with pytest.raises(AssertionError):
        bob.until(alive_at("ann", "10.77.0.77"), within=5)
    ann.process.send_signal(signal.SIGCONT)
    began = time.monotonic()
    bob.until(alive_at("ann", "10.77.0.77"), within=15)
    bob.until(lambda seen: hosts(seen, "ann") == ["10.77.0.77"], within=15)
    print(f"back {time.monotonic() - began:.1f} s after {began - slept:.0f} s of sleep")
    ann.until(lambda seen: seen["states"].get("bob") == "alive", within=15)
    assert "this machine slept for" in ann.log


def test_ipv6_link_local_alone_is_enough(tmp_path: Path) -> None:
    with network() as made:
        switch = made.switch("sw", "10.77.0")
        machines = [made.bare(name) for name in ("ann", "bob")]
        for machine in machines:
            switch.plug(machine, "eth0", None)
            # A second link with the same kind of addresses, and nobody on it.
            made.switch(f"x{machine.name}", "10.79.0").plug(machine, "eth1", None)
        with nodes(tmp_path, *machines) as (ann, bob):
            ann.until(alive_at("bob", "fe80::"))
            bob.until(alive_at("ann", "fe80::"))
            assert bob.seen["hosts"]["ann"].endswith("%eth0")
            bob.until(lambda seen: len(hosts(seen, "ann")) == 2)
            assert not any("%" in host for host in hosts(bob.seen, "ann"))


def test_two_clusters_on_one_network_are_told_what_to_do(tmp_path: Path) -> None:
    with network() as made:
        switch = made.switch("sw", "10.77.0")
        machines = [made.machine(name, switch, host) for host, name in enumerate(("ann", "bob"), 2)]
        with nodes(tmp_path, *machines, keys=(KEY, "78" * 32)) as started:
            for node, other in zip(started, ("10.77.0.3", "10.77.0.2"), strict=True):
                deadline = time.monotonic() + 30
                while "another cluster key" not in node.log:
                    assert time.monotonic() < deadline, node.log
                    time.sleep(0.05)
                assert f"at {other};" in node.log
                assert "pxd start --join" in node.log


def test_the_bandwidth_of_slow_links_is_about_right(tmp_path: Path) -> None:
    with network() as made:
        switch = made.switch("sw", "10.77.0")
        names = ("ann", "bob", "cat")
        machines = [made.machine(name, switch, host) for host, name in enumerate(names, 2)]
        limits = {"bob": 20, "cat": 200}
        for machine in machines[1:]:
            machine.limit("eth0", limits[machine.name])
        with nodes(tmp_path, *machines) as started:
            for node in started:
                node.until(lambda seen: len(seen["bandwidths"]) == 2, within=90)
            found = {node.name: node.seen["bandwidths"] for node in started}
    print("GB/s", found)
    for name, mbit in limits.items():
        gbs = mbit / 8 / 1000
        for figure in found[name].values():
            assert gbs / 3 < figure < gbs * 3
    assert min(found["ann"].values()) > max(found["cat"].values()) > max(found["bob"].values())
