"""Do all nodes run the same pxd, and hold the same revision of the model?"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts
from pxd.doctor.findings import Finding
from pxd.models import catalog
from pxd.models.errors import ModelError

CHECK, MODEL_CHECK = "version", "model-files"


def _order(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def versions(facts: Facts) -> list[Finding]:
    by_version = defaultdict(list)
    for peer in facts.live:
        by_version[peer.record.pxd or "unknown"].append(peer.name)
    mine = facts.own.pxd
    others = {version: names for version, names in by_version.items() if version != mine}
    if not others:
        whom = f" on {words.plural(len(facts.live) + 1, 'node')}" if facts.live else ""
        return [findings.ok(CHECK, f"pxd {mine}{whom}")]
    differ = words.listed(
        f"{words.listed(names)} with pxd {version}" for version, names in sorted(others.items())
    )
    newest = max((mine, *others), key=_order)
    behind = ["this node"] if mine != newest else []
    behind += [name for version, names in others.items() if version != newest for name in names]
    text = f"this node runs pxd {mine}, {differ}"
    return [findings.warning(CHECK, text, f"update {words.listed(behind)} to pxd {newest}")]


def models(facts: Facts) -> list[Finding]:
    """Revisions of one name, told apart by the fingerprints in the records."""
    held: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    records = [("this node", facts.own), *((peer.name, peer.record) for peer in facts.live)]
    for name, record in records:
        for model in record.models:
            if model.fingerprint:
                held[model.name][model.fingerprint].append(name)
    found = []
    for model_name, revisions in sorted(held.items()):
        if len(revisions) > 1:
            found.append(_differing(model_name, revisions))
        elif holders := next(iter(revisions.values())):
            text = f"same revision of {model_name} on {words.listed(holders)}"
            found.append(findings.ok(MODEL_CHECK, text))
    return found


def _differing(model: str, revisions: Mapping[str, list[str]]) -> Finding:
    counts = Counter({mark: len(holders) for mark, holders in revisions.items()})
    common = counts.most_common(1)[0][0]
    odd = [name for mark, names in revisions.items() if mark != common for name in names]
    details = tuple(
        f"{mark[:12]}: {words.listed(names)}" for mark, names in sorted(revisions.items())
    )
    text = f"the files of {model} differ between nodes, so its answers may be nonsense"
    which = f"on {words.listed(odd)}" if counts[common] > 1 else "on one of them"
    remedy = f"copy the same files to all nodes, or fetch them anew {which}, and restart it"
    return findings.warning(MODEL_CHECK, text, remedy, details)


def lenders(facts: Facts) -> dict[str, list[str]]:
    """By model, the other nodes that have files of it."""
    found: dict[str, list[str]] = defaultdict(list)
    for peer in facts.live:
        for model in peer.record.models:
            found[model.name].append(peer.name)
    return found


def files(names: list[str], lent: Mapping[str, list[str]]) -> list[Finding]:
    """Whether this machine can have the files of the chosen models; see `lenders` for `lent`.
    Blocks, for a worker thread; asks no hub."""
    found = []
    for name in names:
        try:
            where = catalog.cached_directory(name)
        except ModelError as error:
            where = None
            if name not in lent:
                remedy = (
                    "put the model there on one node at least, or choose one by its hub id: "
                    "`pxd models use M`"
                )
                found.append(findings.problem(MODEL_CHECK, str(error), remedy))
                continue
        if where is None and name in lent:
            text = f"what this node needs of {name} comes from {words.listed(lent[name])}"
            found.append(findings.note(MODEL_CHECK, text))
            continue
        if where is None:
            text = f"nothing of {name} has been fetched from the hub to this machine yet"
            found.append(findings.note(MODEL_CHECK, text))
    return found
