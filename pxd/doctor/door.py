"""Who was refused lately, in either direction, and why: wrong key, other version, kicked out."""

import re
from shlex import quote

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts
from pxd.doctor.findings import Finding
from pxd.p2p.refusals import Refusal
from pxd.settings import default_data_dir

RECENT_S = 600.0
KEY, OLD_KEY, VERSION, BANNED, HASTE = (
    "wrong-key",
    "old-key",
    "version",
    "banned",
    "too-many-failures",
)
KEY_CHECK, VERSION_CHECK, DOOR_CHECK = "cluster-key", "protocol", "door"

_SPOKEN = re.compile(r"speaks version \d+ of pxd's protocol, this node \d+")


def door(facts: Facts) -> list[Finding]:
    recent = [each for each in facts.refusals if facts.now - each.at <= RECENT_S]
    members = {peer.id for peer in facts.connected}
    # Who is in by now is no longer shut out.
    recent = [each for each in recent if each.peer not in members]
    wrong = [each for each in recent if each.reason == KEY]
    same_key = not any(each.reason in (KEY, OLD_KEY) for each in recent)
    found = [_wrong_key(facts, _once(wrong))] if wrong else []
    found += [_same_key(facts)] if same_key else []
    makers = {OLD_KEY: _old_key, VERSION: _version, BANNED: _banned, HASTE: _haste}
    return found + [
        make(facts, each)
        for reason, make in makers.items()
        for each in _once(recent)
        if each.reason == reason
    ]


def _once(refusals: list[Refusal]) -> list[Refusal]:
    """The latest per peer and reason: who dials both ways or again and again counts once."""
    return list({(each.peer or each.address, each.reason): each for each in refusals}.values())


def _same_key(facts: Facts) -> Finding:
    text = "nobody with another key has tried to get in, and none turned this node away"
    if facts.connected:
        names = words.listed(peer.name for peer in facts.connected)
        text = f"same cluster key as {names}"
    return findings.ok(KEY_CHECK, text)


def _who(facts: Facts, each: Refusal) -> str:
    member = facts.name(each.peer) if each.peer else ""
    if each.address and member:
        return f"{each.address} ({member})"
    return each.address or member or "somebody"


def _ago(facts: Facts, each: Refusal) -> str:
    return f"{words.seconds(max(0.0, facts.now - each.at))} ago"


def _wrong_key(facts: Facts, wrong: list[Refusal]) -> Finding:
    who = words.listed(_who(facts, each) for each in wrong)
    many = len(wrong) > 1
    text = (
        f"{who} {'hold other keys' if many else 'holds another key'} than this node, so they do "
        f"not let each other in (last {_ago(facts, max(wrong, key=lambda each: each.at))})"
    )
    if facts.connected:
        remedy = (
            "nothing, if it is not yours. To bring it into this cluster, run `pxd ticket` here; "
            "there, with pxd stopped:\nrm DATA-DIR/cluster.key\npxd start --join TICKET"
        )
        return findings.problem(KEY_CHECK, text, remedy)
    directory = facts.settings.data_dir
    option = "" if directory == default_data_dir() else f" --data-dir {quote(str(directory))}"
    remedy = (
        "this node is alone. To bring it into that cluster, run `pxd ticket` there; here:\n"
        f"pxd stop{option}\nrm {quote(str(facts.settings.files.cluster_key))}\n"
        f"pxd start{option} --join TICKET"
    )
    return findings.problem(KEY_CHECK, text, remedy)


def _version(facts: Facts, each: Refusal) -> Finding:
    told = _SPOKEN.search(each.message)
    speaks = told[0] if told else "speaks another version of pxd's protocol than this node"
    text = f"{_who(facts, each)} {speaks} (pxd {facts.status.version}), {_ago(facts, each)}"
    remedy = "install the same release of pxd on both machines; `pxd version` shows it"
    return findings.problem(VERSION_CHECK, text, remedy)


def _old_key(facts: Facts, each: Refusal) -> Finding:
    text = f"the cluster's key was replaced, and {_who(facts, each)} and this node do not hold "
    text += f"the same one ({_ago(facts, each)})"
    remedy = "get a fresh ticket by `pxd ticket` on a member that is in; on the one that is not:\n"
    return findings.problem(KEY_CHECK, text, f"{remedy}pxd start --join TICKET", _said(each))


def _banned(facts: Facts, each: Refusal) -> Finding:
    text = f"{_who(facts, each)} and this node were kept apart {_ago(facts, each)}: one of them "
    text += "was kicked out of the cluster"
    remedy = "nothing, if that was on purpose; else, on a member that is in, see `pxd kick --help`"
    return findings.warning(DOOR_CHECK, text, remedy, _said(each))


def _haste(facts: Facts, each: Refusal) -> Finding:
    text = f"too many attempts from {each.address} to get in have failed; most of what comes from "
    text += f"there is turned away for now ({_ago(facts, each)})"
    remedy = "see what runs there: a node with an old ticket, or somebody who tries the door"
    return findings.warning(DOOR_CHECK, text, remedy)


def _said(each: Refusal) -> tuple[str, ...]:
    return (each.message,) if each.message else ()
