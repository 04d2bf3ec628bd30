"""Is the daemon in order: its cluster, its leader, the nodes it knows, the model it serves?"""

from pxd.doctor import findings, words
from pxd.doctor.facts import Facts, Peer
from pxd.doctor.findings import Finding
from pxd.serving.status import ModelView

SETTLING_S = 30.0


def daemon(facts: Facts) -> list[Finding]:
    status = facts.status
    text = f"the daemon is up for {words.seconds(status.uptime)} at {status.http}"
    found = [findings.ok("daemon", f"{text}, pxd {status.version}")]
    if facts.own.problem:
        remedy = "the daemon's log says more; `pxd status` shows the plan"
        found.append(findings.warning("daemon", facts.own.problem, remedy))
    return [*found, _leader(facts), *_nodes(facts)]


def _leader(facts: Facts) -> Finding:
    leader = facts.status.leader
    if leader is not None:
        return findings.ok("leader", f"{facts.name(leader)} leads the cluster")
    if facts.status.uptime < SETTLING_S:
        return findings.note("leader", "no leader yet; this node has only just started")
    return findings.problem(
        "leader",
        "there is no leader, so nobody makes a plan",
        "see below whether this node can reach the others; if all is well, restart it",
    )


def _nodes(facts: Facts) -> list[Finding]:
    found = []
    if suspect := [peer for peer in facts.peers if peer.state == "suspect"]:
        text = f"{_since(suspect)} without an answer"
        remedy = "is that machine overloaded, asleep, or off the network? `pxd doctor` there tells"
        found.append(findings.warning("nodes", text, remedy))
    if apart := [peer for peer in facts.peers if peer.state == "alive" and not peer.connected]:
        names = words.listed(peer.name for peer in apart)
        text = f"{names} known to be alive, but this node has no connection to them"
        remedy = "run `pxd doctor` there, too: one of the two must be able to connect to the other"
        found.append(findings.warning("nodes", text, remedy))
    if dead := [peer for peer in facts.peers if peer.state == "dead"]:
        text = f"{_since(dead)} gone without a goodbye"
        found.append(findings.note("nodes", text, "if that was not meant, look at that machine"))
    alive = sum(peer.state == "alive" for peer in facts.peers) + 1
    if not found:
        found.append(findings.ok("nodes", f"{words.plural(alive, 'node')} in the cluster"))
    return found


def _since(peers: list[Peer]) -> str:
    return words.listed(f"{peer.name} for {words.seconds(peer.since)}" for peer in peers)


def model(facts: Facts) -> list[Finding]:
    """The state of what is served, and of this node's own part in it."""
    if not facts.status.models:
        return [findings.note("model", "no plan yet, so no model is served")]
    found = [_model(view) for view in facts.status.models]
    for report in facts.own.stages:
        if report.state in ("failed", "restarting"):
            text = f"layers {report.start} to {report.end} of {report.model} here: {report.state}"
            text += f" ({report.reason})" if report.reason else ""
            remedy = "the daemon's log on this machine has the executor's last words"
            make = findings.problem if report.state == "failed" else findings.warning
            found.append(make("model", text, remedy))
    return found


def _model(view: ModelView) -> Finding:
    why = f": {view.reason}" if view.reason else ""
    match view.state:
        case "serving":
            return findings.ok("model", f"{view.name} is served")
        case "loading":
            return findings.note("model", f"{view.name} is being loaded{why}", "wait a little")
        case "waiting":
            remedy = "add a node, or choose a smaller model with `pxd models use --only M`"
            return findings.warning("model", f"{view.name} is waiting{why}", remedy)
        case "failed":
            remedy = "the reason says what is wrong; choose another with `pxd models use --only M`"
            return findings.problem("model", f"{view.name} cannot be served{why}", remedy)
        case "stopping":
            return findings.note("model", f"{view.name} is being stopped{why}", "wait a little")
