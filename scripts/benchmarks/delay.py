"""Links of any length between programs on this machine.

Every program has a network namespace with a TUN interface. A thread carries the packets from one to
the other and takes its time over it: netem, which could do the same, is missing in many kernels.
"""

import heapq
import itertools
import os
import select
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from scripts.benchmarks.errors import BenchError, CannotRun
from scripts.benchmarks.processes import Program

NETWORK = "10.213.77"
PACKET_BYTES = 65536
ATTACH_TIMEOUT_S = 30.0


class Switch:
    """Carries IPv4 packets between TUN interfaces, each after `delay_s`.

    A context manager; it owns the descriptors that it is given.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self._ports: dict[bytes, int] = {}
        self._under_way: list[tuple[float, int, int, bytes]] = []
        self._numbers = itertools.count()
        self._hosts = itertools.count(1)
        self._wake_read, self._wake_write = os.pipe()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="switch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over = True
        os.write(self._wake_write, b".")
        self._thread.join()
        for descriptor in (*self._ports.values(), self._wake_read, self._wake_write):
            os.close(descriptor)

    def address(self) -> str:
        """One that nobody has had before."""
        return f"{NETWORK}.{next(self._hosts)}"

    def add(self, address: str, descriptor: int) -> None:
        self._ports = {**self._ports, socket.inet_aton(address): descriptor}
        os.write(self._wake_write, b".")

    def _run(self) -> None:
        while not self._over:
            timeout = None
            if self._under_way:
                timeout = max(self._under_way[0][0] - time.monotonic(), 0.0)
            ports = list(self._ports.values())
            ready, _, _ = select.select([self._wake_read, *ports], [], [], timeout)
            for descriptor in ready:
                if descriptor == self._wake_read:
                    os.read(descriptor, 64)
                else:
                    self._take(descriptor)
            self._deliver()

    def _take(self, descriptor: int) -> None:
        due = time.monotonic() + self.delay_s
        while True:
            try:
                packet = os.read(descriptor, PACKET_BYTES)
            except BlockingIOError:
                return
            except OSError:
                # The namespace is gone; its descriptor stays readable for ever.
                self._ports = {k: v for k, v in self._ports.items() if v != descriptor}
                os.close(descriptor)
                return
            receiver = self._ports.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if receiver is not None:
                heapq.heappush(self._under_way, (due, next(self._numbers), receiver, packet))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._under_way and self._under_way[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(self._under_way)
            try:
                os.write(receiver, packet)
            except OSError:
                # Whoever was to get it is gone.
                continue


class Host:
    """A place on a switch for one program.

    `prefix` goes before its command and `pass_fds` with it; `attach` must be called once it runs.
    """

    def __init__(self, switch: Switch) -> None:
        self.address = switch.address()
        self._switch = switch
        self._ours, self._theirs = socket.socketpair()
        self._ours.settimeout(ATTACH_TIMEOUT_S)
        self.pass_fds = (self._theirs.fileno(),)
        enter = (sys.executable, "-m", "scripts.benchmarks.inside")
        self.prefix = (*enter, str(self._theirs.fileno()), self.address)

    def attach(self, program: Program) -> tuple[str, ...]:
        """Plug it in; returns what goes before a command that is to run in the same network."""
        self._theirs.close()
        with self._ours:
            try:
                _, descriptors, _, _ = socket.recv_fds(self._ours, 1, 1)
            except TimeoutError:
                descriptors = []
        if not descriptors:
            raise BenchError(f"no network namespace:\n{program.tail()}")
        os.set_blocking(descriptors[0], False)
        self._switch.add(self.address, descriptors[0])
        enter = ("nsenter", "--target", str(program.pid), "--net")
        return enter if os.geteuid() == 0 else (*enter, "--user", "--preserve-credentials")


@contextmanager
def switch(root: Path) -> Iterator[Switch]:
    """Raises `CannotRun` where there can be none."""
    if sys.platform != "linux":
        raise CannotRun("links with a delay need Linux")
    if not Path("/dev/net/tun").exists():
        raise CannotRun("links with a delay need /dev/net/tun, which is missing")
    if shutil.which("nsenter") is None:
        raise CannotRun("links with a delay need nsenter, of util-linux")
    with Switch() as found:
        host = Host(found)
        probe = Program(
            "probe", (*host.prefix, "sleep", "60"), root / "probe.log", pass_fds=host.pass_fds
        )
        try:
            host.attach(probe)
        except BenchError as error:
            raise CannotRun(
                "links with a delay need network namespaces, which this user may not make here "
                f"(root may): {str(error).splitlines()[-1]}"
            ) from error
        finally:
            probe.stop()
        yield found
