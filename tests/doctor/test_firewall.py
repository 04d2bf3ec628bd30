"""Which firewall is there, what it blocks, and the commands that open it."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from pxd.doctor import firewall, opening
from pxd.doctor.firewall import Firewall, ports_of, read_firewalld, read_macos, read_ufw
from pxd.doctor.packets import Judgement
from pxd.doctor.tools import Answer, ask

from .patients import only
from .test_packets import DROP, dport, ruleset

PORTS = ports_of(8471, 8472)
LISTEN, DATA, MDNS = PORTS

UFW = """\
Status: active
Logging: on (low)
Default: deny (incoming), allow (outgoing), disabled (routed)
New profiles: skip

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW IN    Anywhere
{rules}
8471/tcp (v6)              ALLOW IN    Anywhere (v6)
"""
FIREWALLD = """\
public (default, active)
  target: {target}
  interfaces: eth0
  services: dhcpv6-client {services}
  ports: {ports}
  protocols:
"""


class Tools:
    """Answers to commands by their first two words; what is not there is not installed."""

    def __init__(self, answers: dict[str, Answer]) -> None:
        self._answers = answers

    async def __call__(self, command: Sequence[str]) -> Answer | None:
        return self._answers.get(" ".join(command[:2])) or self._answers.get(command[0])


@pytest.fixture(autouse=True)
def linux(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(firewall, "UFW_CONF", tmp_path / "ufw.conf")
    return tmp_path / "ufw.conf"


@pytest.mark.parametrize(
    ("rules", "blocked"),
    [
        ("", [LISTEN, DATA]),
        ("8471/tcp                   ALLOW IN    Anywhere", [DATA]),
        ("8471:8472/tcp              ALLOW IN    Anywhere", []),
        ("8471                       LIMIT IN    Anywhere", [DATA]),
        ("Anywhere                   ALLOW IN    Anywhere", []),
        ("8471:8472/udp              ALLOW IN    Anywhere", [LISTEN, DATA]),
    ],
)
def test_ufw(rules: str, blocked: list[tuple[str, int]]) -> None:
    found = read_ufw(UFW.format(rules=rules), PORTS)
    assert found.state == "on"
    assert found.ports("blocked") == blocked
    allowing = UFW.format(rules=rules).replace("deny (incoming)", "allow (incoming)")
    assert read_ufw(allowing, PORTS).ports("blocked") == []


def test_ufw_that_denies_one_port_only() -> None:
    text = UFW.format(rules="8472/tcp                   DENY IN     Anywhere")
    text = text.replace("deny (incoming)", "allow (incoming)")
    assert read_ufw(text, PORTS).ports("blocked") == [DATA]


@pytest.mark.parametrize("rule", ["8471/tcp  ALLOW IN  10.0.0.0/8", "OpenSSH  ALLOW IN  Anywhere"])
def test_ufw_rules_that_let_some_in(rule: str) -> None:
    assert LISTEN in read_ufw(UFW.format(rules=rule), PORTS).ports("unknown")


def test_ufw_that_is_off() -> None:
    assert read_ufw("Status: inactive\n", PORTS).state == "off"


@pytest.mark.parametrize(
    ("target", "services", "ports", "blocked"),
    [
        ("default", "", "", [LISTEN, DATA, MDNS]),
        ("default", "mdns", "8471-8472/tcp", []),
        ("default", "", "8471/tcp 5353/udp", [DATA]),
        ("default", "", "8471/udp", [LISTEN, DATA, MDNS]),
        ("ACCEPT", "", "", []),
    ],
)
def test_firewalld(target: str, services: str, ports: str, blocked: list[tuple[str, int]]) -> None:
    text = FIREWALLD.format(target=target, services=services, ports=ports)
    assert read_firewalld(text, PORTS).ports("blocked") == blocked


def test_macos() -> None:
    assert read_macos("Firewall is disabled. (State = 0)", PORTS).state == "off"
    assert read_macos("Firewall is enabled. (State = 1)", PORTS).ports("unknown") == [*PORTS]
    shut = "Firewall is set to block all non-essential incoming connections (State = 2)"
    assert read_macos(shut, PORTS).ports("blocked") == [*PORTS]


async def test_a_front_end_speaks_for_the_rules_beneath() -> None:
    tools = Tools({"ufw": Answer(0, UFW.format(rules="")), "nft": Answer(0, ruleset([DROP]))})
    [found] = await firewall.detect(PORTS, tools)
    assert (found.name, found.state) == ("ufw", "on")


async def test_a_front_end_that_is_off_says_nothing() -> None:
    off = {"ufw": Answer(0, "Status: inactive"), "firewall-cmd": Answer(252, "not running")}
    tools = Tools(off | {"nft": Answer(0, ruleset([dport("tcp", 8471), DROP]))})
    [found] = await firewall.detect(PORTS, tools)
    assert (found.name, found.ports("blocked")) == ("nftables", [LISTEN])


async def test_firewalld_that_runs() -> None:
    zone = FIREWALLD.format(target="default", services="mdns", ports="8471/tcp")
    tools = Tools(
        {"firewall-cmd --state": Answer(0, "running"), "firewall-cmd --list-all": Answer(0, zone)}
    )
    [found] = await firewall.detect(PORTS, tools)
    assert found.ports("blocked") == [DATA]


async def test_nothing_there_and_nothing_set() -> None:
    assert await firewall.detect(PORTS, Tools({})) == ()
    tools = Tools({"nft": Answer(0, ruleset()), "iptables": Answer(0, "-P INPUT ACCEPT\n")})
    assert [each.state for each in await firewall.detect(PORTS, tools)] == ["off", "off"]


async def test_not_being_root(linux: Path) -> None:
    refused = Answer(1, "Operation not permitted (you must be root)")
    tools = Tools({"ufw": refused, "nft": refused, "iptables": refused})
    linux.write_text("ENABLED=no\n")
    found = await firewall.detect(PORTS, tools)
    assert [(each.name, each.state) for each in found] == [
        ("nftables", "hidden"),
        ("iptables", "hidden"),
    ]
    linux.write_text("# the usual\nENABLED=yes\n")
    [ufw] = await firewall.detect(PORTS, tools)
    assert (ufw.name, ufw.state) == ("ufw", "hidden")


async def test_rules_in_a_dialect_that_is_not_known() -> None:
    tools = Tools({"nft": Answer(0, '{"nftables": [{"rule": {"surprise": 1}}]}')})
    [found] = await firewall.detect(PORTS, tools)
    assert found.state == "hidden"


async def test_tools_are_asked_and_may_be_absent() -> None:
    assert await ask(["no-such-firewall-tool"]) is None
    answer = await ask([sys.executable, "-c", "import sys; print('out'); sys.exit('err')"])
    assert answer == Answer(1, "out\nerr\n")


def blocking(name: str = "nftables", *ports: firewall.Port) -> Firewall:
    shut = Judgement("blocked", "inet f in", "tcp dport 8471 drop")
    judgements = {port: shut if port in ports else Judgement("open") for port in PORTS}
    return Firewall(name=name, state="on", judgements=judgements)


@pytest.mark.parametrize(
    ("reached", "level"), [(False, "problem"), (None, "warning"), (True, "warning")]
)
def test_a_blocked_port_is_named_with_the_command(reached: bool | None, level: str) -> None:
    found = only(opening.firewall([blocking("nftables", LISTEN)], reached, LISTEN))
    assert found.level == level
    assert "blocks TCP 8471 (inet f in: tcp dport 8471 drop)" in found.text
    assert ("and yet" in found.text) is (reached is True)
    assert "sudo nft insert rule inet f in tcp dport 8471 accept" in found.remedy.splitlines()


def test_only_the_data_port_is_no_problem() -> None:
    found = only(opening.firewall([blocking("nftables", DATA)], False, LISTEN))
    assert found.level == "warning"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("ufw", "sudo ufw allow 8472/tcp"),
        ("firewalld", "sudo firewall-cmd --permanent --add-port=8472/tcp --add-service=mdns"),
        ("iptables", "sudo iptables -I INPUT -p udp --dport 5353 -j ACCEPT"),
        ("the macOS firewall", f"sudo {firewall.MAC_FILTER} --unblockapp {sys.executable}"),
    ],
)
def test_commands(name: str, command: str) -> None:
    assert command in opening.commands(blocking(name), [DATA, MDNS]).splitlines()


def test_firewalls_in_good_order() -> None:
    assert only(opening.firewall([blocking()], True, LISTEN)).level == "ok"
    assert only(opening.firewall([], None, LISTEN)).level == "ok"
    off = Firewall(name="nftables", state="off")
    assert only(opening.firewall([off], None, LISTEN)).text.endswith("(nftables asked)")


def test_what_cannot_be_told() -> None:
    hidden = Firewall(name="nftables", state="hidden", look="sudo nft list ruleset")
    assert only(opening.firewall([hidden], True, LISTEN)).level == "ok"
    found = only(opening.firewall([hidden], False, LISTEN))
    assert found.level == "note"
    assert "sudo nft list ruleset" in found.remedy
    doubt = Firewall(
        name="the macOS firewall", state="on", judgements={LISTEN: Judgement("unknown")}
    )
    assert only(opening.firewall([doubt], None, LISTEN)).level == "note"
    assert only(opening.firewall([doubt], True, LISTEN)).level == "ok"
    assert only(opening.firewall(None, None, LISTEN)).level == "note"


def test_how_to_open_goes_by_what_was_found() -> None:
    hidden = Firewall(name="nftables", state="hidden", look="sudo nft list ruleset")
    doubt = Firewall(name="iptables", state="on", judgements={LISTEN: Judgement("unknown")})
    assert "see `firewall`" in opening.how_to_open([blocking("ufw", LISTEN)], [LISTEN])
    assert "iptables on this machine may be why" in opening.how_to_open([doubt], [LISTEN])
    assert "sudo nft list ruleset" in opening.how_to_open([hidden], [LISTEN])
    assert "routers" in opening.how_to_open([], [LISTEN, DATA])
    assert "TCP 8471 and 8472" in opening.how_to_open(None, [LISTEN, DATA])
