"""Which firewall runs on this machine, and whether it lets pxd's ports through.

Only commands that read. Most of them answer root alone; then the doctor says how to look.
"""

import logging
import re
import sys
from pathlib import Path
from typing import Literal

import msgspec

from pxd.doctor.packets import (
    Chain,
    Judgement,
    Port,
    Rule,
    iptables_chains,
    judge,
    nft_chains,
)
from pxd.doctor.tools import Ask, ask

log = logging.getLogger("pxd.doctor")

MDNS: Port = ("udp", 5353)
UFW_CONF = Path("/etc/ufw/ufw.conf")
MAC_FILTER = "/usr/libexec/ApplicationFirewall/socketfilterfw"

State = Literal["off", "on", "hidden"]


class Firewall(msgspec.Struct, frozen=True, kw_only=True):
    """One firewall. `judgements` say for each of pxd's ports what it does; `look` is the command
    that shows its rules to root, for when they are hidden from this process."""

    name: str
    state: State
    judgements: dict[Port, Judgement] = {}
    look: str = ""

    def ports(self, verdict: str) -> list[Port]:
        return [port for port, found in self.judgements.items() if found.verdict == verdict]


def ports_of(listen: int, data: int) -> tuple[Port, ...]:
    """What pxd needs to get through."""
    return (("tcp", listen), *((("tcp", data),) if data else ()), MDNS)


async def detect(ports: tuple[Port, ...], run: Ask = ask) -> tuple[Firewall, ...]:
    """The firewalls found, those that rule first. Empty on a system that has none of them."""
    if sys.platform == "darwin":
        return await _macos(ports, run)
    for front in (await _ufw(ports, run), await _firewalld(ports, run)):
        if front is not None and front.state != "off":
            # What they have set up underneath is their business.
            return (front,)
    nft = await _nftables(ports, run)
    found = [nft, await _iptables(ports, run)] if nft is None or nft.state != "on" else [nft]
    return tuple(each for each in found if each is not None)


async def _ufw(ports: tuple[Port, ...], run: Ask) -> Firewall | None:
    answer = await run(["ufw", "status", "verbose"])
    if answer is None:
        return None
    if answer.code == 0:
        return read_ufw(answer.text, ports)
    try:
        enabled = "ENABLED=yes" in UFW_CONF.read_text()
    except OSError:
        enabled = True
    return Firewall(
        name="ufw", state="hidden" if enabled else "off", look="sudo ufw status verbose"
    )


def read_ufw(text: str, ports: tuple[Port, ...]) -> Firewall:
    """From `ufw status verbose`."""
    lines = [line.strip() for line in text.splitlines()]
    if "Status: active" not in lines:
        return Firewall(name="ufw", state="off")
    default = next((line for line in lines if line.startswith("Default:")), "")
    policy = Rule(
        action="accept" if "allow (incoming)" in default else "drop",
        text="it denies what no rule allows",
    )
    rules = [rule for line in lines if (rule := _ufw_rule(line)) is not None]
    # It lets multicast DNS in by itself, see its before.rules.
    multicast = Rule(action="accept", protocols=frozenset(("udp",)), ports=((MDNS[1], MDNS[1]),))
    chain = Chain(name="", drops=policy.action == "drop", rules=(multicast, *rules, policy))
    return _filter("ufw", (chain,), ports)


def _ufw_rule(line: str) -> Rule | None:
    """A line such as ``8471:8472/tcp   ALLOW IN   Anywhere``; None for any other."""
    columns = re.split(r"\s{2,}", line)
    if len(columns) < 3 or "(v6)" in line:
        return None
    to, action, source = columns[:3]
    verdict = action.partition(" ")[0]
    if verdict not in ("ALLOW", "LIMIT", "DENY", "REJECT") or "OUT" in action or "FWD" in action:
        return None
    known = re.fullmatch(r"(\d+)(?::(\d+))?(?:/(tcp|udp))?", to)
    low, high, protocol = known.groups() if known else (None, None, None)
    return Rule(
        action="accept" if verdict in ("ALLOW", "LIMIT") else "drop",
        text=f"its rule {to} {verdict} {source}",
        protocols=frozenset((protocol,)) if protocol else None,
        ports=((int(low), int(high or low)),) if low else None,
        perhaps=source != "Anywhere" or (known is None and to != "Anywhere"),
    )


async def _firewalld(ports: tuple[Port, ...], run: Ask) -> Firewall | None:
    answer = await run(["firewall-cmd", "--state"])
    if answer is None:
        return None
    if "not running" in answer.text or "running" not in answer.text:
        return Firewall(name="firewalld", state="off")
    zone = await run(["firewall-cmd", "--list-all"])
    if zone is None or zone.code != 0:
        return Firewall(name="firewalld", state="hidden", look="sudo firewall-cmd --list-all")
    return read_firewalld(zone.text, ports)


def read_firewalld(text: str, ports: tuple[Port, ...]) -> Firewall:
    """From `firewall-cmd --list-all`, which tells of the default zone."""
    fields = {}
    for line in text.splitlines():
        label, _, value = line.strip().partition(":")
        fields[label] = value.split()
    ranges = []
    for spec in fields.get("ports", []):
        span, _, protocol = spec.partition("/")
        low, _, high = span.partition("-")
        if low.isdecimal():
            ranges.append((protocol, int(low), int(high or low)))

    def is_open(port: Port) -> bool:
        return (
            fields.get("target") == ["ACCEPT"]
            or (port == MDNS and "mdns" in fields.get("services", []))
            or any(port[0] == kind and low <= port[1] <= high for kind, low, high in ranges)
        )

    closed = Judgement("blocked", "", "its default zone does not allow it")
    judgements = {port: Judgement("open") if is_open(port) else closed for port in ports}
    return Firewall(name="firewalld", state="on", judgements=judgements)


def _filter(name: str, chains: tuple[Chain, ...], ports: tuple[Port, ...]) -> Firewall:
    if not any(chain.drops or chain.rules for chain in chains):
        return Firewall(name=name, state="off")
    return Firewall(name=name, state="on", judgements={port: judge(chains, port) for port in ports})


async def _nftables(ports: tuple[Port, ...], run: Ask) -> Firewall | None:
    answer = await run(["nft", "-j", "list", "ruleset"])
    if answer is None:
        return None
    try:
        if answer.code == 0:
            return _filter("nftables", nft_chains(answer.text), ports)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        log.debug("cannot read the rules of nftables: %r", error)
    return Firewall(name="nftables", state="hidden", look="sudo nft list ruleset")


async def _iptables(ports: tuple[Port, ...], run: Ask) -> Firewall | None:
    answer = await run(["iptables", "-S", "INPUT"])
    if answer is None:
        return None
    try:
        if answer.code == 0:
            return _filter("iptables", iptables_chains(answer.text), ports)
    except ValueError as error:
        log.debug("cannot read the rules of iptables: %r", error)
    return Firewall(name="iptables", state="hidden", look="sudo iptables -S INPUT")


async def _macos(ports: tuple[Port, ...], run: Ask) -> tuple[Firewall, ...]:
    found = []
    answer = await run([MAC_FILTER, "--getglobalstate"])
    if answer is not None:
        found.append(read_macos(answer.text, ports))
    packet_filter = await run(["pfctl", "-s", "info"])
    if packet_filter is not None and "Status: Enabled" in packet_filter.text:
        found.append(Firewall(name="pf", state="hidden", look="sudo pfctl -s rules"))
    return tuple(found)


def read_macos(text: str, ports: tuple[Port, ...]) -> Firewall:
    """From `socketfilterfw --getglobalstate`."""
    name = "the macOS firewall"
    if "State = 0" in text or "disabled" in text.lower():
        return Firewall(name=name, state="off")
    if "State = 2" in text:
        closed = Judgement("blocked", "", "it blocks all incoming connections")
    else:
        closed = Judgement("unknown", "", "it asks for each program")
    return Firewall(name=name, state="on", judgements=dict.fromkeys(ports, closed))
