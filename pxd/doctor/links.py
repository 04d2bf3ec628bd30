"""How far away is every peer, and how fast is the way to it?"""

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts, Peer
from pxd.doctor.findings import Finding

CHECK = "links"
LISTED = 16
SLOW_RTT_S = 0.005
"""A wired network stays well below; Wi-Fi and the wide area do not."""

NARROW_GBS = 0.05
"""Less than half a gigabit per second."""


def _line(peer: Peer) -> str:
    rtt = "rtt not measured yet" if peer.rtt is None else f"{peer.rtt * 1000:.2f} ms"
    speed = "bandwidth not measured yet"
    if peer.bandwidth is not None:
        speed = f"{peer.bandwidth:.3g} GB/s"
    way = "through a relay" if peer.relayed else ("on this machine" if peer.here else "")
    return ", ".join(part for part in (f"{peer.name}: {rtt}", speed, way) if part)


def _badness(peer: Peer) -> tuple[bool, float]:
    return peer.relayed, peer.rtt or 0.0


def links(facts: Facts) -> list[Finding]:
    peers = sorted(facts.connected, key=_badness, reverse=True)
    if not peers:
        return []
    details = tuple(_line(peer) for peer in peers[:LISTED])
    if len(peers) > LISTED:
        details += (f"and {len(peers) - LISTED} more that are nearer",)
    relayed = [peer for peer in peers if peer.relayed]
    far = [peer for peer in peers if peer.rtt is not None and peer.rtt > SLOW_RTT_S]
    narrow = [peer for peer in peers if peer.bandwidth is not None and peer.bandwidth < NARROW_GBS]
    complaints = []
    if relayed:
        names = words.listed(peer.name for peer in relayed)
        complaints.append(f"{names} can be reached through a relay only, which costs speed")
    if far:
        names = words.listed(peer.name for peer in far)
        complaints.append(f"{names} over {SLOW_RTT_S * 1000:.0f} ms away, as by Wi-Fi or far off")
    if narrow:
        names = words.listed(peer.name for peer in narrow)
        complaints.append(f"less than {NARROW_GBS} GB/s to {names}")
    if not complaints:
        text = f"the way to {words.plural(len(peers), 'peer')} is short"
        return [findings.Finding(check=CHECK, level="ok", text=text, details=details)]
    remedy = "a cable helps most; every token passes each link of a pipeline"
    if relayed:
        remedy = f"let TCP {words.ports(facts.ports)[5:].strip()} through to one side; {remedy}"
    return [findings.note(CHECK, "; ".join(complaints), remedy, details)]
