"""Can other nodes connect to this machine? They are asked to try."""

from collections.abc import Sequence

import msgspec
import trio

from pxd.doctor import findings, words
from pxd.doctor.facts import DoctorNetwork, Facts, Peer
from pxd.doctor.findings import Finding
from pxd.doctor.interfaces import interface_of
from pxd.doctor.opening import Firewalls, how_to_open
from pxd.doctor.packets import Port
from pxd.p2p.addresses import parse_address
from pxd.p2p.network import CallFailed, NetworkError
from pxd.p2p.reach import DIAL, DialBack, DialBackAnswer, Dialled, Outcome

CHECK, DATA_CHECK = "reach", "data-port"
ASKED = 3
ASK_TIMEOUT_S = 7.0

_WORDS: dict[Outcome, str] = {
    "ok": "works",
    "refused": "refused",
    "timeout": "no answer",
    "unreachable": "no route",
    "other": "another program or node answers there",
    "skipped": "not tried",
}


class Asked(msgspec.Struct, frozen=True):
    """One peer's answer; `failure` says why there is none, `code` in one word."""

    peer: Peer
    answer: DialBackAnswer | None = None
    failure: str = ""
    code: str = ""


def choose(peers: Sequence[Peer]) -> list[Peer]:
    """Whom to ask: those on other machines first, and on different ones."""
    chosen: list[Peer] = []
    for rank in (0, 1, 2):
        hosts = {peer.host for peer in chosen}
        for peer in peers:
            again = 1 if peer.host in hosts else 0
            if peer not in chosen and (2 if peer.here else again) <= rank:
                chosen.append(peer)
                hosts.add(peer.host)
    return chosen[:ASKED]


async def ask(network: DoctorNetwork, facts: Facts) -> list[Asked]:
    answers: list[Asked] = []

    async def one(peer: Peer) -> None:
        request = DialBack(facts.ports[1])
        try:
            answer = await network.call(peer.id, DIAL, request, timeout=ASK_TIMEOUT_S)
            answers.append(Asked(peer, answer))
        except CallFailed as error:
            answers.append(Asked(peer, None, str(error), error.code))
        except NetworkError as error:
            answers.append(Asked(peer, None, str(error)))

    async with trio.open_nursery() as nursery:
        for peer in choose(facts.connected):
            nursery.start_soon(one, peer)
    return sorted(answers, key=lambda asked: asked.peer.name)


def reached(asked: Sequence[Asked] | None) -> bool | None:
    """Whether anybody got through to the listen port; None where nobody on another machine tried,
    which is what a firewall here would notice."""
    tried = [each for each in asked or () if each.answer and not each.peer.here]
    if not tried:
        return None
    return any(_works(each) for each in tried)


def _results(each: Asked) -> list[Dialled]:
    return (
        [result for result in each.answer.results if result.listen != "skipped"]
        if (each.answer)
        else []
    )


def _works(each: Asked) -> bool:
    return any(result.listen == "ok" for result in _results(each))


def reach(facts: Facts, asked: Sequence[Asked] | None, firewalls: Firewalls) -> list[Finding]:
    if not facts.connected:
        text = "there is no other node to ask whether it can connect to this one"
        return [findings.note(CHECK, text)]
    if asked is None:
        return [findings.note(CHECK, "other nodes took too long to try whether they can connect")]
    tried = [each for each in asked if _results(each)]
    if not tried:
        return [_nobody_tried(asked)]
    able = [each for each in tried if _works(each)]
    if not able:
        return [_unreachable(facts, tried, asked, firewalls)]
    unable = [each for each in tried if each not in able]
    found = [_mixed(facts, able, unable, firewalls)] if unable else [_fine(facts, able)]
    return [*found, *_data_port(facts, able, firewalls)]


def _nobody_tried(asked: Sequence[Asked]) -> Finding:
    if all(each.code == "unknown-method" for each in asked):
        names = words.listed(each.peer.name for each in asked)
        text = f"{names} cannot be asked to connect to this node"
        return findings.note(CHECK, text, "run the same release of pxd on all machines")
    details = tuple(f"{each.peer.name}: {_no_try(each)}" for each in asked)
    text = "no other node would try to connect to this one"
    return findings.note(CHECK, text, "ask again in half a minute", details)


def _no_try(each: Asked) -> str:
    return each.failure or "it dials none of the addresses of this node"


def _where(facts: Facts, result: Dialled) -> str:
    address = parse_address(result.address)
    interface = interface_of(address.host, facts.interfaces)
    return f"{address.host} ({interface})" if interface else address.host


def _lines(facts: Facts, asked: Sequence[Asked]) -> tuple[str, ...]:
    return tuple(
        f"from {each.peer.name}: "
        + (
            ", ".join(f"{_where(facts, r)} {_WORDS[r.listen]}" for r in _results(each))
            or _no_try(each)
        )
        for each in asked
    )


def _unreachable(
    facts: Facts, tried: Sequence[Asked], asked: Sequence[Asked], firewalls: Firewalls
) -> Finding:
    listen = facts.ports[0]
    names = words.listed(each.peer.name for each in tried)
    outcomes = {result.listen for each in tried for result in _results(each)}
    what = _WORDS[outcomes.pop()] if len(outcomes) == 1 else "all its addresses fail"
    text = f"{names} cannot connect to this machine on port {listen}: {what}"
    if {result.listen for each in tried for result in _results(each)} == {"other"}:
        remedy = (
            "another machine has this one's address, or a router forwards the port elsewhere: "
            "start with --listen and a port of its own"
        )
    else:
        remedy = how_to_open(firewalls, _tcp(facts))
    text += "; it is in the cluster only through connections that it makes itself"
    return findings.problem(CHECK, text, remedy, _lines(facts, asked))


def _mixed(
    facts: Facts, able: Sequence[Asked], unable: Sequence[Asked], firewalls: Firewalls
) -> Finding:
    text = (
        f"{words.listed(each.peer.name for each in able)} can connect to this machine on port "
        f"{facts.ports[0]}, but {words.listed(each.peer.name for each in unable)} cannot"
    )
    remedy = how_to_open(firewalls, _tcp(facts))
    return findings.warning(CHECK, text, remedy, _lines(facts, [*able, *unable]))


def _fine(facts: Facts, able: Sequence[Asked]) -> Finding:
    names = words.listed(each.peer.name for each in able)
    local = all(each.peer.here for each in able)
    text = f"{names} can connect to this machine on port {facts.ports[0]}"
    if local:
        text += "; being on this machine, they say nothing about firewalls"
    results = [result for each in able for result in _results(each)]
    good = {result.address for result in results if result.listen == "ok"}
    bad = {r.address: r for r in results if r.address not in good}
    if not bad:
        return findings.ok(CHECK, text)
    where = words.listed(f"{_where(facts, r)}: {_WORDS[r.listen]}" for r in bad.values())
    text += f"; not at {where}, which is fine as long as another address works"
    return findings.note(CHECK, text, "", _lines(facts, able))


def _data_port(facts: Facts, able: Sequence[Asked], firewalls: Firewalls) -> list[Finding]:
    """Of those who reach the listen port, who reaches the data port there, too?"""
    data = facts.ports[1]
    if not data:
        return []
    barred = [
        each for each in able if not any(r.data == "ok" for r in _results(each) if r.listen == "ok")
    ]
    if not barred:
        names = words.listed(each.peer.name for each in able)
        return [findings.ok(DATA_CHECK, f"{names} can open data channels on port {data}")]
    text = (
        f"{words.listed(each.peer.name for each in barred)} cannot connect to the data port {data} "
        "of this machine: activations take the slower way through the control connection"
    )
    ports: list[Port] = [("tcp", data)]
    return [findings.warning(DATA_CHECK, text, how_to_open(firewalls, ports))]


def _tcp(facts: Facts) -> list[Port]:
    return [("tcp", port) for port in facts.ports if port]
