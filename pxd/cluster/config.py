"""Timing and bounds of membership, the former after the LAN defaults of HashiCorp's memberlist."""

import msgspec


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. `probe_timeout` is how long a direct probe waits before others are asked.

    A helper that has heard nothing from the target for `nack_timeout` says so; it must be well
    below `probe_interval` - `probe_timeout`. `lost_timeout` takes the place of a whole probe when
    the transport says that a connection is gone; a suspicion ends `vanished_timeout` after nobody
    listens any more where the node was. All of these but `nack_timeout` grow with this
    node's own ill health, up to 1 + `max_ill_health` times. A suspicion lasts `suspicion_factor` *
    log10(members) * `probe_interval` when enough others confirm it, and up to `suspicion_spread`
    times that otherwise. `reconnect_interval` is how often one of the dead is tried, so that a
    healed partition is noticed. `drop_after` counts from death or leave; `tombstone_for` is how
    long stale gossip is refused after that. A tick later than `lateness` means that this node
    itself was frozen.

    A node spreads its own changes `record_burst` at once and `record_rate` per second on average,
    less often from `flat_members` on, so that the cluster's news does not grow with it; others take
    twice that from it. `refutation_rate` and `refutation_burst` are the same for contradictions.
    Of unknown nodes, those beyond `max_members` are refused, and records that would make all of
    them together larger than `record_budget` bytes unless they are no larger than their fair share.
    Of one peer, `verify_burst` signatures and `verify_rate` per second are looked at. Of nodes that
    are unknown here it may tell `newcomer_burst` and `newcomer_rate` per second, unless this node
    has just come and asked for all there are. It is sent up to `answer_burst` records and
    `answer_rate` per second because it asked for them.
    """

    probe_interval: float = 1.0
    probe_timeout: float = 0.5
    nack_timeout: float = 0.3
    lost_timeout: float = 0.5
    vanished_timeout: float = 1.0
    indirect_probes: int = 3
    max_ill_health: int = 8
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
    record_rate: float = 2.0
    record_burst: float = 6.0
    flat_members: int = 32
    refutation_rate: float = 1.0
    refutation_burst: float = 3.0
    max_members: int = 4096
    record_budget: int = 8 << 20
    verify_rate: float = 200.0
    verify_burst: float = 4096.0
    newcomer_rate: float = 8.0
    newcomer_burst: float = 256.0
    answer_rate: float = 64.0
    answer_burst: float = 4096.0
