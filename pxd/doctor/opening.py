"""How to let pxd through a firewall: the exact commands, and what to say of what was found."""

import sys
from collections.abc import Sequence

from pxd.doctor import findings, words
from pxd.doctor.findings import Finding
from pxd.doctor.firewall import MAC_FILTER, Firewall
from pxd.doctor.packets import Port

CHECK = "firewall"

Firewalls = Sequence[Firewall] | None
"""None: they could not be looked for in time."""


def listed(ports: Sequence[Port]) -> str:
    """ "TCP 8471 and 8472, UDP 5353"."""
    by_kind = {kind: _numbers(ports, kind) for kind in ("tcp", "udp")}
    return ", ".join(
        f"{kind.upper()} {words.listed(map(str, numbers))}"
        for kind, numbers in by_kind.items()
        if numbers
    )


def _numbers(ports: Sequence[Port], kind: str) -> list[int]:
    return sorted(number for each, number in ports if each == kind)


def commands(firewall: Firewall, ports: Sequence[Port]) -> str:
    """The command lines that let `ports` through."""
    tcp, udp = _numbers(ports, "tcp"), _numbers(ports, "udp")
    if firewall.name == "ufw":
        lines = [f"sudo ufw allow {number}/{kind}" for kind, number in ports]
    elif firewall.name == "firewalld":
        options = [f"--add-port={number}/tcp" for number in tcp]
        options += ["--add-service=mdns"] if udp else []
        lines = [f"sudo firewall-cmd --permanent {' '.join(options)}", "sudo firewall-cmd --reload"]
    elif firewall.name == "nftables":
        lines = [_nft(firewall, port) for port in ports]
    elif firewall.name == "iptables":
        lines = [
            f"sudo iptables -I INPUT -p {kind} --dport {number} -j ACCEPT" for kind, number in ports
        ]
    elif firewall.name == "the macOS firewall":
        lines = [
            f"sudo {MAC_FILTER} --setblockall off",
            f"sudo {MAC_FILTER} --add {sys.executable}",
            f"sudo {MAC_FILTER} --unblockapp {sys.executable}",
        ]
    else:
        lines = [firewall.look]
    return "\n".join(lines)


def _nft(firewall: Firewall, port: Port) -> str:
    chain = firewall.judgements[port].chain or "inet filter input"
    return f"sudo nft insert rule {chain} {port[0]} dport {port[1]} accept"


def how_to_open(firewalls: Firewalls, ports: Sequence[Port]) -> str:
    """What to do so that others get through to `ports`, given what was found."""
    for firewall in firewalls or ():
        if shut := [port for port in ports if port in firewall.ports("blocked")]:
            return f"open {listed(shut)} in {firewall.name} on this machine, see `{CHECK}`"
    for firewall in firewalls or ():
        if shut := [port for port in ports if port in firewall.ports("unknown")]:
            return f"{firewall.name} on this machine may be why; open {listed(shut)}:\n" + (
                commands(firewall, shut)
            )
    if looks := [firewall.look for firewall in firewalls or () if firewall.state == "hidden"]:
        return f"see whether a firewall on this machine keeps {listed(ports)} shut:\n" + "\n".join(
            looks
        )
    if firewalls is None:
        return f"let {listed(ports)} through every firewall from there to here"
    return (
        "no firewall on this machine keeps them out, so look between the machines: routers, "
        f"switches and cloud rules must let {listed(ports)} through, and Wi-Fi guest networks "
        "keep machines apart"
    )


def firewall(firewalls: Firewalls, reached: bool | None, listen: Port) -> list[Finding]:
    """`reached`: whether others got through to the port `listen`; None where nobody could try.

    Where a firewall surely blocks a port, the commands that open it are here and nowhere else.
    """
    if firewalls is None:
        return [findings.note(CHECK, "the firewall's rules could not be read in time")]
    active = [each for each in firewalls if each.state == "on"]
    found = [_active(each, reached, listen) for each in active]
    hidden = [each for each in firewalls if each.state == "hidden"]
    if hidden and not active:
        found.append(_hidden(hidden, reached))
    if not found:
        looked = words.listed(each.name for each in firewalls)
        inside = f" ({looked} asked)" if looked else ""
        found.append(findings.ok(CHECK, f"no firewall is active on this machine{inside}"))
    return found


def _active(each: Firewall, reached: bool | None, listen: Port) -> Finding:
    blocked, unknown = each.ports("blocked"), each.ports("unknown")
    if blocked:
        why = {
            f"{judgement.chain}: {judgement.by}" if judgement.chain else judgement.by
            for port, judgement in each.judgements.items()
            if port in blocked
        }
        text = f"{each.name} on this machine blocks {listed(blocked)} ({'; '.join(sorted(why))})"
        remedy = f"open {listed(blocked)}:\n" + commands(each, blocked)
        if listen in blocked and reached is False:
            return findings.problem(CHECK, text, remedy)
        if listen in blocked and reached:
            text += ", and yet others get through"
        return findings.warning(CHECK, text, remedy)
    if unknown and not reached:
        text = f"{each.name} is active; whether it lets {listed(unknown)} through depends on more "
        text += "than can be told here"
        return findings.note(CHECK, text, "if others cannot connect:\n" + commands(each, unknown))
    return findings.ok(CHECK, f"{each.name} is active and lets pxd through")


def _hidden(hidden: list[Firewall], reached: bool | None) -> Finding:
    names = words.listed(each.name for each in hidden)
    if reached:
        return findings.ok(CHECK, f"the rules of {names} are for root's eyes; others get through")
    looks = "\n".join(each.look for each in hidden)
    return findings.note(CHECK, f"only root may see the rules of {names}", f"look:\n{looks}")
