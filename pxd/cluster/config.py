"""Timing of membership, after the LAN defaults of HashiCorp's memberlist. Seconds."""

import msgspec


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`probe_timeout` is how long a direct probe waits before others are asked to probe too.

    `lost_timeout` takes the place of a whole probe when the transport says that a connection is
    gone. A suspicion lasts `suspicion_factor` * log10(members) * `probe_interval` when enough
    others confirm it, and up to `suspicion_spread` times that otherwise. `reconnect_interval` is
    how often one of the dead is tried, so that a healed partition is noticed. `drop_after` counts
    from death or leave; `tombstone_for` is how long stale gossip is refused after that. A tick
    later than `lateness` means that this node itself was frozen.
    """

    probe_interval: float = 1.0
    probe_timeout: float = 0.5
    lost_timeout: float = 0.5
    indirect_probes: int = 3
    suspicion_factor: float = 3.0
    suspicion_spread: float = 1.5
    confirmations: int = 2
    gossip_interval: float = 0.1
    gossip_fanout: int = 3
    retransmissions: int = 4
    sync_interval: float = 15.0
    reconnect_interval: float = 5.0
    drop_after: float = 60.0
    tombstone_for: float = 3600.0
    max_tombstones: int = 4096
    lateness: float = 0.25
