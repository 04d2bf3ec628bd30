"""Which arrays an unevaluated MLX array depends on."""

import io
import re
from collections import defaultdict
from collections.abc import Mapping

import mlx.core as mx

_EDGE = re.compile(r'^(?:"(?P<source>[^"]+)"|(?P<op>\d+)) -> (?:"(?P<result>[^"]+)"|(?P<user>\d+))')


class DependencyGraph:
    """The graph behind some named arrays, none of which is evaluated.

    MLX shows its graphs only as DOT text, so that is what is read here.
    """

    def __init__(self, arrays: Mapping[str, mx.array]) -> None:
        self._parents: defaultdict[str, list[str]] = defaultdict(list)
        self._names = set(arrays)
        text = io.StringIO()
        mx.export_to_dot(text, **arrays)
        text.seek(0)
        for line in text:
            match = _EDGE.match(line)
            if match:
                source = match["source"] or match["op"]
                self._parents[match["result"] or match["user"]].append(source)

    def sources(self, name: str) -> set[str]:
        """Names of the arrays that `name` is computed from; the search ends at each of them."""
        found: set[str] = set()
        seen = {name}
        open_nodes = list(self._parents[name])
        while open_nodes:
            node = open_nodes.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._names:
                found.add(node)
            else:
                open_nodes.extend(self._parents[node])
        return found
