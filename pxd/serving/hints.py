"""Why does this node see no other? What a person is told who waits for two machines to meet."""

from collections.abc import Sequence

from pxd.p2p.refusals import Refusal
from pxd.p2p.sightings import Discovered

SETTLING_S = 20.0
RECENT_S = 600.0
REFUSALS_SHOWN = 2


def hints(
    discovered: Discovered,
    refusals: Sequence[Refusal],
    *,
    connected: bool,
    expects_peers: bool,
    uptime: float,
    now: float,
) -> list[str]:
    """Sentences, the likeliest cause first; none for a node that is `connected` with another.

    `expects_peers`: there is a ticket, or there were members before. `uptime` in seconds, `now`
    in seconds since the epoch.
    """
    if connected:
        return []
    recent = [each for each in refusals if now - each.at <= RECENT_S]
    said = [_sentence(each) for each in reversed(recent)]
    found = list(dict.fromkeys(said))[:REFUSALS_SHOWN]
    hosts = [address.split("/")[2] for each in discovered.foreign for address in each.addresses[:1]]
    if hosts:
        found.append(
            f"a pxd node with another cluster key is on this network, at {hosts[-1]}: to join its "
            "cluster, `pxd ticket` there and `pxd start --join TICKET` here"
        )
    if discovered.mdns:
        found.append(
            f"cannot look for other nodes on the local network ({discovered.mdns}): join with "
            "`pxd start --join TICKET`"
        )
    if expects_peers and uptime >= SETTLING_S:
        found.append("no connection with another node of the cluster; `pxd doctor` looks for why")
    return found


def _sentence(refusal: Refusal) -> str:
    return refusal.message or f"cannot connect to {refusal.address}: {refusal.reason}"
