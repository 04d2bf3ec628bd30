"""Rules of packet filters: what they do with a new connection."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.doctor.packets import iptables_chains, judge, nft_chains

LISTEN, DATA, MDNS = ("tcp", 8471), ("tcp", 8472), ("udp", 5353)


def match(left: dict[str, Any], right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": left, "right": right}}


def dport(protocol: str, right: Any) -> dict[str, Any]:
    return match({"payload": {"protocol": protocol, "field": "dport"}}, right)


ESTABLISHED = match({"ct": {"key": "state"}}, ["established", "related"], "in")
ACCEPT, DROP, REJECT = {"accept": None}, {"drop": None}, {"reject": {"type": "icmpx"}}
FROM_LAN = match({"payload": {"protocol": "ip", "field": "saddr"}}, "10.0.0.5")


def ruleset(*rules: list[dict[str, Any]], policy: str = "accept", hook: str = "input") -> str:
    """As `nft -j list ruleset` prints it."""
    at = {"family": "inet", "table": "filter"}
    items: list[dict[str, Any]] = [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "filter"}},
        {"chain": {**at, "name": "in", "type": "filter", "hook": hook, "policy": policy}},
        {"chain": {**at, "name": "helper"}},
    ]
    items += [{"rule": {**at, "chain": "in", "expr": rule}} for rule in rules]
    return json.dumps({"nftables": items})


@pytest.mark.parametrize(
    ("rules", "policy", "verdict"),
    [
        ([], "accept", "open"),
        ([], "drop", "blocked"),
        ([[dport("tcp", 8471), DROP]], "accept", "blocked"),
        ([[dport("tcp", 8471), {"counter": {}}, REJECT]], "accept", "blocked"),
        ([[dport("tcp", {"set": [22, {"range": [8000, 9000]}]}), DROP]], "accept", "blocked"),
        ([[dport("tcp", 22), DROP]], "accept", "open"),
        ([[dport("udp", 8471), DROP]], "accept", "open"),
        ([[dport("th", 8471), DROP]], "accept", "blocked"),
        ([[dport("tcp", {"range": [8471, 8472]}), ACCEPT]], "drop", "open"),
        ([[ESTABLISHED, ACCEPT]], "drop", "blocked"),
        ([[ESTABLISHED, DROP]], "accept", "open"),
        ([[match({"ct": {"key": "state"}}, "new", "in"), DROP]], "accept", "blocked"),
        ([[match({"meta": {"key": "iif"}}, "lo"), ACCEPT]], "drop", "blocked"),
        ([[match({"meta": {"key": "l4proto"}}, "tcp"), DROP]], "accept", "blocked"),
        ([[match({"meta": {"key": "l4proto"}}, "udp"), DROP]], "accept", "open"),
        ([[FROM_LAN, ACCEPT]], "drop", "unknown"),
        ([[FROM_LAN, DROP]], "accept", "unknown"),
        ([[FROM_LAN, DROP]], "drop", "blocked"),
        ([[FROM_LAN, DROP], [dport("tcp", 8471), ACCEPT]], "drop", "unknown"),
        ([[{"jump": {"target": "helper"}}]], "accept", "unknown"),
        ([[dport("tcp", 22), {"jump": {"target": "helper"}}]], "drop", "blocked"),
        ([[dport("tcp", 8471), {"log": {}}]], "accept", "open"),
        ([[{"limit": {"rate": 5}}, ACCEPT]], "drop", "unknown"),
        ([[dport("tcp", 8471), ACCEPT], [DROP]], "accept", "open"),
        ([[DROP], [dport("tcp", 8471), ACCEPT]], "accept", "blocked"),
        ([[match({"payload": {"protocol": "tcp", "field": "dport"}}, 22, "!="), DROP]], "accept",
         "unknown"),
    ],
)  # fmt: skip
def test_nftables(rules: list[list[dict[str, Any]]], policy: str, verdict: str) -> None:
    assert judge(nft_chains(ruleset(*rules, policy=policy)), LISTEN).verdict == verdict


def test_the_rule_that_blocks_is_named() -> None:
    found = judge(nft_chains(ruleset([dport("tcp", {"set": [22, 8471]}), DROP])), LISTEN)
    assert (found.chain, found.by) == ("inet filter in", "tcp dport { 22, 8471 } drop")
    by_policy = judge(nft_chains(ruleset(policy="drop")), LISTEN)
    assert by_policy.by == "its policy is to drop"


def test_only_what_arrives_counts() -> None:
    assert nft_chains(ruleset([DROP], hook="forward")) == ()
    assert judge((), LISTEN).verdict == "open"


def test_every_chain_must_let_it_through() -> None:
    both = nft_chains(ruleset([dport("tcp", 8471), ACCEPT], policy="drop")) + nft_chains(
        ruleset([dport("tcp", 8471), DROP])
    )
    assert judge(both, LISTEN).verdict == "blocked"


TYPICAL = """\
-P INPUT DROP
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -m comment --comment "let -j DROP in" -j ACCEPT
-A INPUT -p tcp -m multiport --dports 80,8471:8480 -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -j LOG --log-prefix "dropped: "
-A INPUT -s 10.0.0.0/8 -p udp -m udp --dport 9999 -j ACCEPT
"""


@pytest.mark.parametrize(
    ("text", "port", "verdict"),
    [
        ("-P INPUT ACCEPT\n", LISTEN, "open"),
        ("-P INPUT DROP\n", LISTEN, "blocked"),
        (TYPICAL, LISTEN, "open"),
        (TYPICAL, DATA, "open"),
        (TYPICAL, ("tcp", 22), "open"),
        (TYPICAL, MDNS, "blocked"),
        (TYPICAL, ("udp", 9999), "unknown"),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 8471 -j REJECT --reject-with x\n", LISTEN,
         "blocked"),
        ("-P INPUT ACCEPT\n-A INPUT ! -s 10.0.0.1/32 -p tcp -j DROP\n", LISTEN, "unknown"),
        ("-P INPUT ACCEPT\n-A INPUT -j ufw-before-input\n", LISTEN, "unknown"),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp --dport 8471\n", LISTEN, "open"),
    ],
)  # fmt: skip
def test_iptables(text: str, port: tuple[str, int], verdict: str) -> None:
    assert judge(iptables_chains(text), port).verdict == verdict  # type: ignore[arg-type]


def test_something_else_than_rules() -> None:
    with pytest.raises(ValueError, match="no policy"):
        iptables_chains("iptables: Permission denied")
    with pytest.raises(ValueError):
        nft_chains("no json")


@given(st.lists(st.sampled_from([*"-!", "-p", "tcp", "--dport", "8471", "-j", "DROP", "-A"])))
def test_odd_rules_are_judged_somehow(tokens: list[str]) -> None:
    text = f"-P INPUT ACCEPT\n-A INPUT {' '.join(tokens)}\n"
    assert judge(iptables_chains(text), LISTEN).verdict in ("open", "blocked", "unknown")
