"""Does multicast work, and who is heard by it? Machines on one network find each other by it."""

from collections.abc import Sequence

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts, HeardPeer, Peer
from pxd.doctor.findings import Finding
from pxd.doctor.firewall import MDNS
from pxd.doctor.loops import Loop
from pxd.doctor.opening import Firewalls, how_to_open
from pxd.p2p.addresses import parse_address

CHECK, HEARD_CHECK, FOREIGN_CHECK = "multicast", "neighbours", "other-clusters"
SETTLED_S = 20.0
JOIN = "`pxd ticket` there prints a ticket; here, `pxd start --join TICKET`"

Loops = Sequence[Loop] | None


def loopback(loops: Loops, firewalls: Firewalls) -> list[Finding]:
    """What the test on each interface says."""
    if loops is None:
        return [findings.note(CHECK, "the multicast test took too long")]
    if not loops:
        text = "no network interface of this machine can do multicast, so nobody is found by it"
        return [findings.note(CHECK, text, f"join by ticket: {JOIN}")]
    good = [loop for loop in loops if not loop.failure]
    found = []
    for loop in loops:
        if not loop.failure:
            continue
        name = loop.interface.name
        if loop.interface.inner:
            text = f"multicast does not work on {name}, as is usual for tunnels and inner networks"
            found.append(findings.note(CHECK, text))
            continue
        text = f"multicast is blocked on {name}: {loop.failure}; a firewall on this machine?"
        found.append(findings.problem(CHECK, text, how_to_open(firewalls, [MDNS])))
    if good:
        names = words.listed(loop.interface.name for loop in good)
        found.insert(0, findings.ok(CHECK, f"multicast works on {names}"))
    return found


def multicast(facts: Facts, loops: Loops, firewalls: Firewalls) -> list[Finding]:
    """`loopback`, and whether those who should be heard are."""
    if not facts.settings.mdns:
        text = "this node does not look for others on the network (--no-mdns)"
        return [findings.note(CHECK, text, "start without --no-mdns, or join by ticket")]
    found = loopback(loops, firewalls)
    discovered = facts.discovered
    if discovered is not None and discovered.mdns:
        text = f"mDNS does not run on this node: {discovered.mdns}"
        return [*found, findings.problem(CHECK, text, f"join by ticket instead: {JOIN}")]
    return [*found, *_neighbours(facts, loops or (), firewalls), *_foreign(facts)]


def _neighbours(facts: Facts, loops: Sequence[Loop], firewalls: Firewalls) -> list[Finding]:
    heard = {each.peer for each in facts.discovered.heard} if facts.discovered else set()
    answered = {host for loop in loops for host in loop.answers}
    near = [peer for peer in facts.live if _is_near(facts, peer)]
    silent = [peer for peer in near if not answered & set(peer.hosts)]
    # A firewall here may keep out answers to the test's query, though not what mDNS itself hears.
    if not firewalls_are_off(firewalls):
        silent = [peer for peer in silent if facts.discovered and peer.id not in heard]
    if silent and facts.status.uptime >= SETTLED_S:
        return [_silent(silent, loops)]
    if near:
        names = words.listed(peer.name for peer in near)
        return [findings.ok(HEARD_CHECK, f"{names} on this network can be found by multicast")]
    if not facts.live and not heard and not answered and not _strangers(facts):
        text = "no other pxd is heard on this network"
        remedy = (
            "if there should be one: is `pxd start` running there, and is it in the same network "
            f"(not a guest Wi-Fi)? Across networks, {JOIN}"
        )
        return [findings.note(HEARD_CHECK, text, remedy)]
    return []


def firewalls_are_off(firewalls: Firewalls) -> bool:
    return firewalls is not None and all(each.state == "off" for each in firewalls)


def _is_near(facts: Facts, peer: Peer) -> bool:
    """In a subnet of this machine, on another machine."""
    if peer.here or set(peer.hosts) & set(facts.own_hosts):
        return False
    return any(
        interface.holds(host)
        for interface in facts.interfaces
        if not interface.inner
        for host in peer.hosts
    )


def _silent(silent: Sequence[Peer], loops: Sequence[Loop]) -> Finding:
    names = words.listed(peer.name for peer in silent)
    they = "it is" if len(silent) == 1 else "they are"
    text = (
        f"multicast does not get through between {names} and this machine, though {they} in the "
        "same network and connected"
        if all(peer.connected for peer in silent)
        else f"{names} in the same network cannot be heard by multicast"
    )
    if any(loop.failure and not loop.interface.inner for loop in loops):
        remedy = "first let multicast through on this machine, see above"
    else:
        remedy = (
            "no hurry, as tickets work without it: `pxd start --join TICKET`. The usual causes: "
            "Wi-Fi access points that keep clients apart, managed switches, a firewall there that "
            "blocks UDP 5353 (run `pxd doctor` there), or a start there with --no-mdns"
        )
    return findings.warning(HEARD_CHECK, text, remedy)


def _strangers(facts: Facts) -> Sequence[HeardPeer]:
    return facts.discovered.foreign if facts.discovered else ()


def _foreign(facts: Facts) -> list[Finding]:
    hosts = sorted({host for each in _strangers(facts) for host in _hosts(each)})
    if not hosts:
        return []
    text = f"another pxd cluster (with another key) is on this network, at {words.listed(hosts)}"
    remedy = f"to move this node there, use a ticket of that cluster: {JOIN}"
    if facts.live:
        return [findings.note(FOREIGN_CHECK, text, f"nothing, if that is meant so; {remedy}")]
    return [findings.warning(FOREIGN_CHECK, text + ", and this node is alone", remedy)]


def _hosts(each: HeardPeer) -> list[str]:
    """Hosts in announcements, which may be multiaddrs or plain."""
    hosts = []
    for text in each.addresses:
        try:
            hosts.append(parse_address(text).host)
        except ValueError:
            hosts.append(text)
    return hosts[:1]
