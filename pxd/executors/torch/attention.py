"""Attention as transformers' models call it, over keys and values that somebody keeps.

A model passes its new keys and values to its cache and then calls the attention function that its
configuration names. Both lead to the same `Keeper`, which knows whose positions they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "pxd"
MOST_SCORES = 1 << 28
"""Of heads times positions times those before them: where they are computed, they take 1 GiB."""


Expand = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Manner(NamedTuple):
    """How a layer attends. `window` is how many positions it sees, itself included; None is all.
    `expand` makes keys and values of what is kept, where that is something smaller (MLA)."""

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    expand: Expand | None = None

    def expanded(
        self, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (keys, values) if self.expand is None else self.expand(keys, values)


class Keeper(Protocol):
    """Keys and values during one forward pass. Quacks like transformers' `Cache`, too."""

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep ``(1, heads, positions, numbers)`` of each, and return what attention is given."""

    def attend(self, layer: int, queries: torch.Tensor, manner: Manner) -> torch.Tensor:
        """For queries ``(1, heads, positions, numbers)`` return ``(positions, heads, numbers)``."""


class CacheManners:
    """What models ask of a cache besides `update`: every pass begins at its own position 0, since
    positions are told to the model and masks are made by the keeper."""

    is_compileable = False
    is_sliding = (False,)

    def get_seq_length(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    def get_query_offset(self, *_args: Any, **_kwargs: Any) -> int:
        return 0

    def get_mask_sizes(self, positions: int, *_args: Any, **_kwargs: Any) -> tuple[int, int]:
        return positions, 0

    def get_max_cache_shape(self, *_args: Any, **_kwargs: Any) -> int:
        return -1


_keeper: ContextVar[Keeper | None] = ContextVar("keeper")


@contextmanager
def kept_by(keeper: Keeper | None) -> Iterator[None]:
    """Whose attention models compute meanwhile; None for their own."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)


def _attend(
    module: Any,
    query: torch.Tensor,
    _key: torch.Tensor,
    _value: torch.Tensor,
    _mask: torch.Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    keeper = _keeper.get()
    if keeper is None:
        raise RuntimeError("nobody keeps the keys and values of this pass")
    expand = getattr(module, "expand_kv", None)
    manner = Manner(scaling, sliding_window or None, softcap, s_aux, expand)
    return keeper.attend(module.layer_idx, query, manner)[None], None


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)


def attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    manner: Manner,
    last: torch.Tensor,
) -> torch.Tensor:
    """Attention of ``(rows, heads, n, numbers)`` to ``(rows, kv heads, m, numbers)``.

    Query i of a row is at position ``last[row, i]`` and sees the keys up to there. Returns
    ``(rows, heads, n, numbers)``. Memory is bounded, however long the rows are.
    """
    rows, heads, count = queries.shape[:3]
    most = max(1, MOST_SCORES // (rows * heads * keys.shape[2]))
    place = torch.arange(keys.shape[2], device=keys.device)
    parts = []
    for begin in range(0, count, most):
        some = last[:, begin : begin + most, None]
        sees = place <= some
        if manner.window is not None:
            sees &= place > some - manner.window
        parts.append(_masked(queries[:, :, begin : begin + most], keys, values, manner, sees))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def causal(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, manner: Manner
) -> torch.Tensor:
    """The same for as many queries as keys, from position 0 on."""
    count = queries.shape[2]
    plain = manner.softcap is None and manner.sinks is None
    if plain and (manner.window is None or manner.window >= count):
        return F.scaled_dot_product_attention(
            queries,
            keys,
            values,
            is_causal=True,
            scale=manner.scale,
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
    last = torch.arange(count, device=keys.device).expand(queries.shape[0], count)
    return attention(queries, keys, values, manner, last)


def _masked(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    manner: Manner,
    sees: torch.Tensor,
) -> torch.Tensor:
    """`sees` ``(rows, n, m)``: which keys a query may attend to."""
    heads, grouped = queries.shape[1], queries.shape[1] // keys.shape[1]
    if manner.softcap is None and manner.sinks is None:
        return F.scaled_dot_product_attention(
            queries, keys, values, sees[:, None], scale=manner.scale, enable_gqa=grouped != 1
        )
    keys = keys.repeat_interleave(grouped, dim=1)
    values = values.repeat_interleave(grouped, dim=1)
    scale = queries.shape[-1] ** -0.5 if manner.scale is None else manner.scale
    scores = (queries @ keys.transpose(-1, -2) * scale).float()
    if manner.softcap is not None:
        scores = manner.softcap * torch.tanh(scores / manner.softcap)
    scores = scores.masked_fill(~sees[:, None], -torch.inf)
    if manner.sinks is not None:
        sinks = manner.sinks.float().reshape(1, heads, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    shares = scores.softmax(dim=-1)[..., : keys.shape[2]]
    return shares.to(values.dtype) @ values


class Passing(CacheManners):
    """One sequence, all of it in one pass; nothing is kept but what a position takes.

    `shapes` are of the keys and values of one position by layer: (heads, numbers, numbers).
    """

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.shapes[layer] = keys.shape[1], keys.shape[3], values.shape[3]
        self._given[layer] = keys, values
        return keys, values

    def attend(self, layer: int, queries: torch.Tensor, manner: Manner) -> torch.Tensor:
        keys, values = manner.expanded(*self._given[layer])
        return causal(queries, keys, values, manner)[0].transpose(0, 1)
