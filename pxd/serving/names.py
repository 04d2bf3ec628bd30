"""What people call a node: its name, its peer id, or the beginning of that."""

import re

from pxd.serving.doorview import NodeRef

_PEER_ID = re.compile(r"12D3KooW[1-9A-HJ-NP-Za-km-z]{44}")


def resolve(wanted: str, known: dict[str, str], *, known_only: bool = False) -> NodeRef:
    """The node of `known` (names by peer id) that is meant; a whole peer id may be of any node.

    Raises LookupError, with words for people, when there is none or more than one.
    """
    named = [peer for peer, name in known.items() if wanted and name == wanted]
    begun = [peer for peer in known if wanted and peer.startswith(wanted)]
    found = [wanted] if wanted in known else named or begun
    if len(found) == 1:
        return NodeRef(id=found[0], name=known[found[0]])
    if found:
        listed = ", ".join(f"{known[peer] or '-'} ({peer})" for peer in sorted(found)[:8])
        raise LookupError(
            f"{wanted!r} may be {len(found)} nodes; give the peer id of one: {listed}"
        )
    if _PEER_ID.fullmatch(wanted) and not known_only:
        return NodeRef(id=wanted, name="")
    names = ", ".join(sorted(name or peer for peer, name in known.items())[:16]) or "none"
    listed = "banned" if known_only else "known here"
    raise LookupError(f"there is no such node: {wanted!r}; {listed}: {names}")
