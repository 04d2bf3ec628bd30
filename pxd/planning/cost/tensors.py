"""From the names of a checkpoint's tensors to bytes per layer, embedding, head and expert."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

import msgspec

_LAYER = re.compile(r"(?P<prefix>(?:[\w-]+\.)*?)(?P<layer>\d{1,5})\.")
IGNORED = re.compile(r"(^|[._])(vision|visual|audio|multi_modal|image|mtp)")
EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|wte|tok_embeddings|word_embeddings|embeddings?|embed_in|embed)\."
)
HEAD = re.compile(r"(^|\.)(lm_head|output|embed_out|head|ff_out)\.")
_EXPERTS = re.compile(r"\.(experts|switch_mlp|switch_glu)\.")


class TensorSizes(msgspec.Struct, frozen=True):
    """Bytes. `head` counts a tied projection too; `experts` are all routed ones of each layer."""

    layers: tuple[int, ...]
    experts: tuple[int, ...]
    embedding: int
    head: int
    tied: bool


def sort_tensors(tensors: Mapping[str, int], layers: int) -> TensorSizes:
    """Tell a language model's tensors apart by their names; those of other towers do not count.

    Where the names do not number `layers` layers, all of them get an equal part.
    """
    prefix, _ = find_layers(tensors, layers)
    layer_bytes, expert_bytes = [0] * layers, [0] * layers
    embedding = other = 0
    tied = True
    for name, size in tensors.items():
        number = layer_number(name, prefix)
        if number is not None:
            if number < layers:  # those behind are for drafting, not loaded
                layer_bytes[number] += size
                expert_bytes[number] += size * bool(_EXPERTS.search(name))
            continue
        if IGNORED.search(name) and not EMBEDDING.search(name):
            continue
        tied = tied and not (HEAD.search(name) and not IGNORED.search(name))
        if EMBEDDING.search(name):
            embedding += size
        else:
            other += size
    if prefix is None:
        layer_bytes, other = [-(-other // layers)] * layers, 0
    head = other + (embedding if tied else 0)
    return TensorSizes(tuple(layer_bytes), tuple(expert_bytes), embedding, head, tied)


def find_layers(tensors: Iterable[str], layers: int | None) -> tuple[str | None, int | None]:
    """(what stands before the number of a decoder layer, how many layers there are).

    The prefix with most tensors among those that number all layers: towers for images or sound and
    draft layers have prefixes of their own. None where the names do not tell.
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    counts: Counter[str] = Counter()
    for name in tensors:
        match = _LAYER.match(name)
        if match and not IGNORED.search(name):
            numbers[match["prefix"]].add(int(match["layer"]))
            counts[match["prefix"]] += 1
    complete = [
        prefix
        for prefix, seen in numbers.items()
        if set(range(max(seen) + 1 if layers is None else layers)) <= seen
    ]
    prefix = max(complete, key=lambda prefix: (counts[prefix], prefix), default=None)
    if layers is None and prefix is not None:
        layers = max(numbers[prefix]) + 1
    return prefix, layers


def layer_number(tensor: str, prefix: str | None) -> int | None:
    """The number behind `prefix` in a tensor's name; None for tensors outside the layers."""
    if prefix is None or not tensor.startswith(prefix):
        return None
    number = tensor[len(prefix) :].partition(".")[0]
    return int(number) if number.isdecimal() else None
