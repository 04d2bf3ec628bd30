"""What the nodes stand on: their networks and their disks, and how these are taken away from them.

As root on Linux every node has a network namespace on a common switch, and a small file system for
its data directory. Elsewhere they share loopback and the disk, and some faults cannot be had.
"""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from scripts import netns
from scripts.benchmarks.processes import free_port
from scripts.disorder.schedule import KINDS, Kind

SUBNET = "10.77.0"
FIRST_HOST = 2
CLIENTS_HOST = 200
HTTP_PORT = 8470
LISTEN_PORT = 8471
DISK_MIB = 4
BALLAST = "ballast"
PIECE_BYTES = 4096


class Spot:
    """Where one node runs. `prefix` goes before its commands; `http` and `listen` are HOST:PORT."""

    def __init__(
        self, data_dir: Path, http: str, listen: str, machine: netns.Machine | None = None
    ) -> None:
        self.data_dir = data_dir
        self.http = http
        self.listen = listen
        self.machine = machine
        self.prefix = machine.command() if machine else []

    def fill(self) -> None:
        """Leave no byte free on the disk with the data directory."""
        with (self.data_dir / BALLAST).open("wb", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(bytes(PIECE_BYTES))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        (self.data_dir / BALLAST).unlink(missing_ok=True)


class Ground:
    """`missing` says why some kinds of faults cannot be had here."""

    def __init__(self, spots: Sequence[Spot], missing: dict[Kind, str]) -> None:
        self.spots = spots
        self.missing = missing

    @property
    def kinds(self) -> list[Kind]:
        return [kind for kind in KINDS if kind not in self.missing]

    def part(self, places: Sequence[int]) -> None:
        """Cut the nodes at these places off from all others, but not from clients."""
        machines = [spot.machine for spot in self.spots if spot.machine]
        side = [machines[place] for place in places]
        netns.partition(side, [machine for machine in machines if machine not in side])

    def heal(self) -> None:
        for spot in self.spots:
            if spot.machine:
                spot.machine.heal()


@contextmanager
def ground(root: Path, names: Sequence[str]) -> Iterator[Ground]:
    """Makes the data directories below `root`. Clients belong into the context, in this thread."""
    missing: dict[Kind, str] = {}
    with ExitStack() as stack:
        directories = [root / name for name in names]
        for directory in directories:
            directory.mkdir(parents=True)
            if "disk" not in missing and (why := _mount(stack, directory)):
                missing["disk"] = why
        if why := netns.why_not():
            missing["partition"] = why
            yield Ground([_on_loopback(directory) for directory in directories], missing)
            return
        network = stack.enter_context(netns.network())
        switch = network.switch("sw", SUBNET)
        machines = [
            network.machine(name, switch, host) for host, name in enumerate(names, FIRST_HOST)
        ]
        clients = network.machine("clients", switch, CLIENTS_HOST)
        stack.enter_context(clients.entered())
        yield Ground([_on(*pair) for pair in zip(directories, machines, strict=True)], missing)


def _on(directory: Path, machine: netns.Machine) -> Spot:
    return Spot(directory, f"{machine.ip}:{HTTP_PORT}", f"*:{LISTEN_PORT}", machine)


def _on_loopback(directory: Path) -> Spot:
    return Spot(directory, f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}")


def _mount(stack: ExitStack, directory: Path) -> str:
    """A small disk of its own at the directory; returns why not, empty if it is there."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a small disk of their own needs root on Linux"
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=700", "none", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"`mount -t tmpfs` fails: {done.stderr.strip()}"
    # Lazily: a process that is slow to end may have a file open still.
    stack.callback(subprocess.run, ["umount", "--lazy", str(directory)], check=False)
    return ""
