"""`scripts.netns` for tests, which are skipped where there can be no namespaces."""

import pytest

from scripts.netns import (
    Machine,
    Namespace,
    Network,
    Switch,
    homes,
    lan,
    network,
    partition,
    wait_home,
    why_not,
)

__all__ = [
    "Machine",
    "Namespace",
    "Network",
    "Switch",
    "homes",
    "lan",
    "needs_netns",
    "network",
    "partition",
    "wait_home",
]

needs_netns = pytest.mark.skipif(bool(why_not()), reason=why_not() or "available")
