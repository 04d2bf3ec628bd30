"""What a packet filter does with a connection that is new to this machine.

Rules of nftables and iptables are read into one shape; what a rule says beyond protocol, port and
connection state makes it one that matches perhaps.
"""

import json
import re
import shlex
from collections.abc import Iterator
from typing import Any, Literal

import msgspec

Port = tuple[Literal["tcp", "udp"], int]
Verdict = Literal["open", "blocked", "unknown"]
Action = Literal["accept", "drop", "other"]
Ports = tuple[tuple[int, int], ...]


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """`protocols` and `ports` None mean any. `never`: it does not concern new connections from
    outside; `perhaps`: it has conditions that are not looked at here."""

    action: Action
    text: str = ""
    protocols: frozenset[str] | None = None
    ports: Ports | None = None
    never: bool = False
    perhaps: bool = False

    def matches(self, port: Port) -> bool:
        protocol, number = port
        return (
            not self.never
            and (self.protocols is None or protocol in self.protocols)
            and (self.ports is None or any(low <= number <= high for low, high in self.ports))
        )


class Chain(msgspec.Struct, frozen=True, kw_only=True):
    """A chain that every packet to this machine goes through. `name` as commands want it."""

    name: str
    drops: bool
    rules: tuple[Rule, ...] = ()


class Judgement(msgspec.Struct, frozen=True):
    """`by` quotes the rule or policy that blocks, `chain` is where it stands."""

    verdict: Verdict
    chain: str = ""
    by: str = ""


def judge(chains: tuple[Chain, ...], port: Port) -> Judgement:
    """A packet must be let through by every chain."""
    doubt = Judgement("open")
    for chain in chains:
        verdict = _judge_chain(chain, port)
        if verdict.verdict == "blocked":
            return verdict
        if verdict.verdict == "unknown":
            doubt = verdict
    return doubt


def _judge_chain(chain: Chain, port: Port) -> Judgement:
    """The first rule that surely matches decides, unless one before it may have decided else."""
    perhaps: list[Rule] = []
    policy = Rule(action="drop" if chain.drops else "accept", text="its policy is to drop")
    for rule in (*chain.rules, policy):
        if not rule.matches(port):
            continue
        if rule.perhaps or rule.action == "other":
            perhaps.append(rule)
            continue
        for earlier in perhaps:
            if earlier.action != rule.action:
                return Judgement("unknown", chain.name, earlier.text)
        return Judgement("blocked", chain.name, rule.text) if rule.action == "drop" else _OPEN
    raise AssertionError("the policy matches everything")


_OPEN = Judgement("open")


def nft_chains(text: str) -> tuple[Chain, ...]:
    """The input chains of `nft -j list ruleset`. Raises ValueError when it is something else."""
    items = json.loads(text)["nftables"]
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    for item in items:
        if rule := item.get("rule"):
            key = (rule["family"], rule["table"], rule["chain"])
            rules.setdefault(key, []).append(_nft_rule(rule.get("expr", [])))
    found = []
    for item in items:
        chain = item.get("chain", {})
        if chain.get("hook") == "input" and chain["family"] in ("ip", "inet"):
            key = (chain["family"], chain["table"], chain["name"])
            drops = chain.get("policy") == "drop"
            found.append(Chain(name=" ".join(key), drops=drops, rules=tuple(rules.get(key, ()))))
    return tuple(found)


_NFT_HARMLESS = {"counter", "log", "limit", "comment"}


def _nft_rule(expressions: list[dict[str, Any]]) -> Rule:
    rule = Rule(action="other")
    words = []
    ends = False
    for expression in expressions:
        kind, body = next(iter(expression.items()))
        if kind == "match":
            rule = _nft_match(rule, body)
            words.append(f"{_nft_left(body['left'])} {_nft_words(body['right'])}")
        elif kind in ("accept", "drop", "reject"):
            rule = msgspec.structs.replace(rule, action="accept" if kind == "accept" else "drop")
            words.append(kind)
            ends = True
        elif kind in ("jump", "goto", "vmap", "queue"):
            words.append(kind)
            ends = True
        elif kind == "limit":
            rule = msgspec.structs.replace(rule, perhaps=True)
        elif kind not in _NFT_HARMLESS:
            rule = msgspec.structs.replace(rule, perhaps=True)
            words.append(kind)
    # A rule without a verdict only counts or logs.
    return msgspec.structs.replace(rule, never=rule.never or not ends, text=" ".join(words))


def _nft_match(rule: Rule, body: dict[str, Any]) -> Rule:
    left, right = body["left"], body["right"]
    change = msgspec.structs.replace
    payload, meta = left.get("payload", {}), left.get("meta", {}).get("key")
    plain = body.get("op") in ("==", "in")
    if plain and payload.get("field") == "dport":
        protocol = payload.get("protocol", "th")
        protocols = rule.protocols if protocol == "th" else frozenset((protocol,))
        return change(rule, protocols=protocols, ports=tuple(_nft_ports(right)))
    if plain and (meta == "l4proto" or payload.get("field") in ("protocol", "nexthdr")):
        return change(rule, protocols=frozenset(map(str, _nft_items(right))))
    if plain and left.get("ct", {}).get("key") == "state":
        return change(rule, never=rule.never or "new" not in _nft_items(right))
    if plain and meta in ("iif", "iifname") and list(_nft_items(right)) == ["lo"]:
        return change(rule, never=True)
    return change(rule, perhaps=True)


def _nft_items(right: Any) -> list[Any]:
    if isinstance(right, dict) and "set" in right:
        return list(right["set"])
    return list(right) if isinstance(right, list) else [right]


def _nft_ports(right: Any) -> Iterator[tuple[int, int]]:
    for item in _nft_items(right):
        if isinstance(item, int):
            yield item, item
        elif isinstance(item, dict) and "range" in item:
            low, high = item["range"]
            yield int(low), int(high)


def _nft_left(left: dict[str, Any]) -> str:
    body = next(iter(left.values()))
    if not isinstance(body, dict):
        return str(body)
    return " ".join(str(body[key]) for key in ("protocol", "field", "key") if key in body)


def _nft_words(right: Any) -> str:
    if isinstance(right, dict) and "range" in right:
        return "-".join(map(str, right["range"]))
    if isinstance(right, dict) and "prefix" in right:
        return f"{right['prefix']['addr']}/{right['prefix']['len']}"
    items = [str(i) if isinstance(i, str | int) else _nft_words(i) for i in _nft_items(right)]
    return items[0] if len(items) == 1 else f"{{ {', '.join(items)} }}"


_STATES = re.compile(r"[A-Z]+")
_IPTABLES_ACTIONS: dict[str, Action] = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop"}


def iptables_chains(text: str) -> tuple[Chain, ...]:
    """The INPUT chain of `iptables -S INPUT`; raises ValueError when it is something else."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    policy = next((line.split()[2] for line in lines if line.startswith("-P INPUT ")), None)
    if policy is None:
        raise ValueError("no policy of INPUT in it")
    rules = tuple(_iptables_rule(line) for line in lines if line.startswith("-A INPUT"))
    return (Chain(name="INPUT", drops=policy != "ACCEPT", rules=rules),)


def _iptables_rule(line: str) -> Rule:
    rule = Rule(action="other", text=line)
    change = msgspec.structs.replace
    for option, value in _options(shlex.split(line)[2:]):
        if option == "-p":
            rule = change(rule, protocols=frozenset((value,)))
        elif option in ("--dport", "--dports"):
            rule = change(rule, ports=tuple(_iptables_ports(value)))
        elif option in ("--state", "--ctstate"):
            rule = change(rule, never=rule.never or "NEW" not in _STATES.findall(value))
        elif (option, value) == ("-i", "lo"):
            rule = change(rule, never=True)
        elif option in ("-j", "-g"):
            rule = change(rule, action=_IPTABLES_ACTIONS.get(value, "other"))
            # What follows are options of the target.
            return change(rule, never=rule.never or value in ("LOG", "NFLOG"))
        elif option not in ("-m", "--comment"):
            rule = change(rule, perhaps=True)
    # A rule without a target only counts.
    return change(rule, never=True)


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """(option, its first value); a negated option comes as "!"."""
    for position, word in enumerate(words):
        if word == "!":
            yield "!", ""
        elif word.startswith("-") and (position == 0 or words[position - 1] != "!"):
            value = words[position + 1] if position + 1 < len(words) else ""
            yield word, value


def _iptables_ports(value: str) -> Iterator[tuple[int, int]]:
    for part in value.split(","):
        low, _, high = part.partition(":")
        if low.isdecimal():
            yield int(low), int(high or low)
