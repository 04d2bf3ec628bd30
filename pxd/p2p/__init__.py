"""How nodes talk. `network.Network` is the interface; everything else serves it.

libp2p_network   the real one; tests of other rooms use tests/memory_network.py
host             listens, dials, admits: secure (Noise), muxer (Yamux), keyproof, pending, refusals
sessions         who is in; rpc and services carry calls, casts what may be lost
channels         frames: outbox and inbox over framestreams (tls, or a stream of the muxer)
discovery        finds members: dialer, addressbook, addresses, mdns, interfaces, backoff

Of libp2p 0.8.1 the wire is used: identities, multistream-select, Noise, and Yamux by its
specification. Its Swarm and BasicHost are not: a failed stream handler ends them, a stranger can
fill their inbound slots for good, reads of theirs are unbounded, and a dead peer goes unnoticed.
"""
