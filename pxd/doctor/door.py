"""Who was refused lately, in either direction, and why: wrong key, other version, banned."""

import re
from shlex import quote

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts
from pxd.doctor.findings import Finding
from pxd.p2p.refusals import Refusal
from pxd.settings import default_data_dir

RECENT_S = 600.0
KEY, VERSION, BANNED = "wrong-key", "version", "banned"
KEY_CHECK, VERSION_CHECK, BANNED_CHECK = "cluster-key", "protocol", "banned"

_SPOKEN = re.compile(r"speaks version \d+ of pxd's protocol, this node \d+")


def door(facts: Facts) -> list[Finding]:
    recent = [each for each in facts.refusals if facts.now - each.at <= RECENT_S]
    members = {peer.id for peer in facts.connected}
    # Who is in by now is no longer shut out.
    recent = [each for each in recent if each.peer not in members]
    wrong = [each for each in recent if each.reason == KEY]
    found = [_wrong_key(facts, _once(wrong))] if wrong else [_same_key(facts)]
    found += [_version(facts, each) for each in _once(recent) if each.reason == VERSION]
    found += [_banned(facts, each) for each in _once(recent) if each.reason == BANNED]
    return found


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


def _banned(facts: Facts, each: Refusal) -> Finding:
    text = f"{_who(facts, each)} was refused {_ago(facts, each)}: banned from the cluster"
    said = (each.message,) if each.message else ()
    remedy = "nothing, if somebody kicked it on purpose; see `pxd kick --help` otherwise"
    return findings.warning(BANNED_CHECK, text, remedy, said)
