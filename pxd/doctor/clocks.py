"""Do the clocks agree? Deadlines, logs and certificates are easier to live with when they do."""

import statistics
import sys
from collections.abc import Sequence

import msgspec
import trio

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts, Peer
from pxd.doctor.findings import Finding
from pxd.p2p.clock import Clock, Offset
from pxd.p2p.network import Network, NetworkError

CHECK = "clock"
MOST_ASKED = 16
CALL_TIMEOUT_S = 2.0
TOLERATED_S = 2.0


class Compared(msgspec.Struct, frozen=True):
    """A peer's clock against this one's; None where it did not tell."""

    peer: Peer
    offset: Offset | None


async def compare(clock: Clock, network: Network, peers: Sequence[Peer]) -> list[Compared]:
    """Ask up to `MOST_ASKED` peers, all at once."""
    found: list[Compared] = []

    async def one(peer: Peer) -> None:
        try:
            offset = await clock.compare(network, peer.id, timeout=CALL_TIMEOUT_S)
        except NetworkError:
            # An older release, or a peer that is going; other findings tell of that.
            found.append(Compared(peer, None))
        else:
            found.append(Compared(peer, offset))

    async with trio.open_nursery() as nursery:
        for peer in peers[:MOST_ASKED]:
            nursery.start_soon(one, peer)
    return sorted(found, key=lambda each: each.peer.name)


def set_clock() -> str:
    """How to put a clock right on this system."""
    if sys.platform == "darwin":
        return "sudo sntp -sS time.apple.com"
    return "sudo timedatectl set-ntp true"


def _signed(offset: float) -> str:
    return f"{words.seconds(abs(offset))} {'ahead of' if offset > 0 else 'behind'}"


def clocks(facts: Facts, compared: Sequence[Compared] | None) -> list[Finding]:
    if not facts.connected:
        return []
    told = [(each.peer, each.offset) for each in compared or () if each.offset is not None]
    if not told:
        return [findings.note(CHECK, "no other node told its time")]
    # This node's own clock has a vote, too.
    middle = statistics.median([0.0, *(offset.seconds for _, offset in told)])
    off = [
        (peer, offset)
        for peer, offset in told
        if abs(offset.seconds) - offset.uncertainty > TOLERATED_S
    ]
    if not off:
        most = max(abs(offset.seconds) for _, offset in told)
        doubt = max(offset.uncertainty for _, offset in told)
        text = f"the clocks of {words.plural(len(told) + 1, 'node')} agree to within "
        return [findings.ok(CHECK, text + words.seconds(most + doubt))]
    if len(told) == 1:
        peer, offset = off[0]
        text = f"the clock of {peer.name} is {_signed(offset.seconds)} that of this machine"
        remedy = f"put the wrong one right; on this machine:\n{set_clock()}"
        return [findings.warning(CHECK, text, remedy)]
    if abs(middle) > TOLERATED_S:
        text = f"this machine's clock is {_signed(-middle)} those of most others"
        remedy = f"put it right:\n{set_clock()}"
        return [findings.warning(CHECK, text, remedy)]
    wrong = words.listed(f"{peer.name} is {_signed(o.seconds)} this machine" for peer, o in off)
    text = f"clocks differ: {wrong}, which agrees with most others"
    return [findings.warning(CHECK, text, f"put it right there, on Linux with:\n{LINUX}")]


LINUX = "sudo timedatectl set-ntp true"
