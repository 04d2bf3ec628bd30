"""Blocks of MLX's caches as bytes, for the second KV tier."""

import logging
from collections.abc import Mapping, Sequence

import mlx.core as mx

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors import tier
from pxd.executors.mlx.batch import Request, own_caches
from pxd.executors.mlx.measure import has_own_memory
from pxd.executors.mlx.prefixes import PrefixStore
from pxd.executors.mlx.stage import Caches
from pxd.executors.mlx.tensors import dtype_of, from_wire, to_wire
from pxd.executors.protocol import LoadSpec
from pxd.executors.slots import Report
from pxd.wire import Buffer, Tensor

log = logging.getLogger("pxd.executors.mlx")


class CacheBlocks:
    """See `pxd.executors.tier.KvBlocks`. A block is keys and values of one cache behind the
    other."""

    def __init__(self, used_caches: Caches, prefixes: PrefixStore) -> None:
        """Raises `TypeError` for types that have no name on the wire."""
        self._parts = [
            Tensor(dtype_of(array), (1, array.shape[1], BLOCK_TOKENS, array.shape[3]))
            for cache in used_caches
            for array in (cache.keys, cache.values)
        ]
        self.block_bytes = sum(part.nbytes for part in self._parts)
        self._prefixes = prefixes

    def owners(self, blocks: Sequence[int]) -> list[tuple[Request | None, int]]:
        return self._prefixes.owners(blocks)

    def read(self, blocks: Sequence[int]) -> list[Buffer | None]:
        found = self._prefixes.blocks(blocks)
        mx.eval(found)
        return [
            b"".join(to_wire(array)[1] for array in arrays) if arrays else None for arrays in found
        ]

    def write(self, request: Request, _place: int, data: Sequence[Buffer]) -> None:
        arrays = self._arrays(data)
        caches = own_caches(request)
        for cache, keys, values in zip(caches, arrays[::2], arrays[1::2], strict=True):
            cache.update_and_fetch(keys, values)
        mx.eval([cache.state for cache in caches])

    def _arrays(self, blocks: Sequence[Buffer]) -> list[mx.array]:
        """Keys and values by turns, of blocks one behind the other."""
        arrays, begin = [], 0
        for part in self._parts:
            end = begin + part.nbytes
            pieces = [from_wire(part, memoryview(block)[begin:end]) for block in blocks]
            arrays.append(mx.concatenate(pieces, axis=2))
            begin = end
        return arrays


def open_tier(
    spec: LoadSpec,
    used_caches: Caches,
    prefixes: PrefixStore,
    requests: Mapping[int, Request],
    report: Report,
) -> tier.Tier[Request] | None:
    """See `pxd.executors.tier.open_tier`."""
    try:
        blocks = CacheBlocks(used_caches, prefixes)
    except TypeError as error:
        log.warning("no KV tier: %s", error)
        return None
    return tier.open_tier(spec, blocks, requests, report, own_memory=has_own_memory())
