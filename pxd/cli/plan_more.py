"""What one more machine would change."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from pxd.cli.plan_report import Candidate, OneMore, tokens_per_s
from pxd.planning.links import Link
from pxd.planning.machines import Machine
from pxd.planning.model import NodeOffer
from pxd.planning.result import ClusterPlan, PlanInputs

MAX_NODES = 64
MAX_KINDS = 8
_GIB = 1 << 30

Planner = Callable[[PlanInputs], ClusterPlan]


def one_more(
    inputs: PlanInputs,
    plan: ClusterPlan,
    planner: Planner,
    machines: Mapping[str, str],
    wanted: Sequence[Machine],
) -> OneMore:
    """Plans again with one more of each kind of machine there is, and of each that is wanted.

    A machine of a kind that is there gets the links of the node it equals; one that is not has
    none that anybody has measured. `machines` says what the nodes are.
    """
    if len(inputs.offers) > MAX_NODES:
        return OneMore([], f"only done for up to {MAX_NODES} nodes")
    now = tokens_per_s(plan)
    candidates = []
    for label, like, larger in _larger(inputs, machines, wanted):
        then = planner(larger)
        shortage = then.shortage
        candidates.append(
            Candidate(
                machine=label,
                like=like,
                fits=shortage is None,
                tokens_per_s=tokens_per_s(then),
                gain=tokens_per_s(then) - now,
                missing_gib=None if shortage is None else shortage.missing_bytes / _GIB,
                pipelines=len(then.pipelines),
            )
        )
    candidates.sort(key=lambda each: (-each.tokens_per_s, each.missing_gib or 0, each.machine))
    return OneMore(candidates)


def _larger(
    inputs: PlanInputs, machines: Mapping[str, str], wanted: Sequence[Machine]
) -> Iterator[tuple[str, str | None, PlanInputs]]:
    """(what is added, which node it equals, the inputs with it)"""
    kinds = _kinds(inputs.offers)
    labels = Counter(machines.get(offer.id, "") for offer in kinds)
    for offer in kinds:
        label = machines.get(offer.id, "")
        added = msgspec.structs.replace(offer, id=_fresh_id(inputs, offer.id))
        links = _links_like(inputs.links, offer.id, added.id)
        if labels[label] > 1:
            label = ""
        yield label, offer.id, _with(inputs, added, links)
    for machine in wanted:
        yield machine.name, None, _with(inputs, machine.offer(_fresh_id(inputs, machine.name)))


def _kinds(offers: Sequence[NodeOffer]) -> list[NodeOffer]:
    """One node of every kind, those with the most memory first."""
    kinds: dict[NodeOffer, NodeOffer] = {}
    for offer in sorted(offers, key=lambda offer: (-offer.memory, offer.id)):
        kinds.setdefault(msgspec.structs.replace(offer, id="", measured=None), offer)
    return list(kinds.values())[:MAX_KINDS]


def _with(inputs: PlanInputs, offer: NodeOffer, links: Sequence[Link] = ()) -> PlanInputs:
    return msgspec.structs.replace(
        inputs, offers=(*inputs.offers, offer), links=(*inputs.links, *links)
    )


def _fresh_id(inputs: PlanInputs, base: str) -> str:
    taken = {offer.id for offer in inputs.offers}
    name = f"{base}+1"
    while name in taken:
        name += "'"
    return name


def _links_like(links: Sequence[Link], node: str, added: str) -> list[Link]:
    """Those of `node`, for `added`; the two are as near to each other as any that `node` has."""
    own = [link for link in links if node in (link.a, link.b)]
    found = [
        msgspec.structs.replace(
            link, a=added if link.a == node else link.a, b=added if link.b == node else link.b
        )
        for link in own
    ]
    if own:
        rtt = min((link.rtt for link in own if link.rtt > 0), default=0.0)
        found.append(Link(node, added, rtt, max(link.bandwidth for link in own)))
    return found
