"""The namespaces that other tests build on do what they say."""

import socket
import subprocess

from tests.netns import Machine, lan, needs_netns, network, partition

pytestmark = needs_netns


# A refused connection shows that packets pass in both directions.
_TRY = """
import socket, sys
s = socket.socket(); s.settimeout(0.5)
try: s.connect((sys.argv[1], 9))
except ConnectionRefusedError: sys.exit(0)
except OSError: sys.exit(1)
"""


def pings(one: Machine, other: str) -> bool:
    command = one.command("python", "-c", _TRY, other)
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_machines_on_a_switch_reach_each_other_until_they_are_parted() -> None:
    with lan(["a", "b", "c"]) as (a, b, c):
        assert pings(a, b.ip)
        partition([a], [b, c])
        assert not pings(a, b.ip)
        assert pings(b, c.ip)
        for machine in (a, b, c):
            machine.heal()
        assert pings(a, b.ip)


def test_functions_run_inside() -> None:
    def host_of() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(("10.77.0.99", 9))
            return probe.getsockname()[0]

    with lan(["a"]) as (a,):
        assert a.call(host_of) == a.ip


def test_a_router_lets_out_but_not_in() -> None:
    with network() as made:
        home, world = made.switch("home", "192.168.5"), made.switch("world", "198.51.100")
        made.router("router", home, world, 1)
        inside = made.machine("inside", home, 2, gateway="192.168.5.1")
        outside = made.machine("outside", world, 9, gateway="198.51.100.1")
        assert pings(inside, outside.ip)
        assert not pings(outside, inside.ip)
