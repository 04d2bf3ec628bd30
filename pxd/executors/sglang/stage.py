"""One rank's share of a stage: the passes of a step through SGLang's model runner."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.protocol import ExecutorError
from pxd.executors.sglang.passes import Entry, Layout, Pass, layout_of
from pxd.executors.sglang.runtime import RankSpec, open_runner
from pxd.executors.torch.tensors import from_wire
from pxd.wire import Buffer, Tensor

LISTED_NAMES = 5
MOST_ROWS_LOST = 0.01
"""Of a parameter that the checkpoint has. Some are put together from several tensors."""
SENT = frozenset({"hidden_states", "residual"})
TRIAL_TOKENS = 3


class RankStage:
    """Layers [start, end) on one device, with as many blocks of KV as `blocks` says.

    Block b is page b + 1 of SGLang's pool, whose first page is for padding: its allocators and
    caches, which would decide for themselves, are not used.
    """

    def __init__(self, spec: RankSpec) -> None:
        """Raises `ExecutorError`, and whatever SGLang raises."""
        self.first, self.last = spec.start == 0, spec.end == spec.layers
        self.layers = spec.end - spec.start
        self._runner = runner = open_runner(spec)
        _drop_unused_head(runner.model, self.last)
        _check_weights(runner.model)
        if runner.model_config.model_is_mrope:
            raise ExecutorError("it numbers positions in several ways at once")
        self.device = torch.device(runner.device)
        self.dtype: torch.dtype = runner.dtype
        self.hidden_size: int = runner.model_config.hidden_size
        self.vocabulary: int = runner.model_config.vocab_size
        self.context: int = runner.model_config.context_len
        self.most_entries: int = runner.req_to_token_pool.size
        self.blocks: int = runner.max_total_num_tokens // BLOCK_TOKENS
        self._buffers = _buffers_of(runner.token_to_kv_pool)
        if self.blocks < 1:
            raise ExecutorError(f"there is no room for one block of {BLOCK_TOKENS} positions of KV")
        self._try()

    @property
    def weight_bytes(self) -> int:
        # Tied weights count once.
        tensors = self._runner.model.state_dict().values()
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return sum(buffer[:BLOCK_TOKENS].nbytes for buffer in self._buffers)

    def active_bytes(self, used_blocks: int) -> int:
        if self.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self.device))
        return self.weight_bytes + used_blocks * self.block_bytes

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), as they all are before."""
        sources, targets = (torch.tensor(blocks, device=self.device) + 1).unbind(1)
        for buffer in self._buffers:
            pages = buffer.view(-1, BLOCK_TOKENS, *buffer.shape[1:])
            pages[targets] = pages[sources]

    def forward(self, passes: Sequence[Pass], tensor: Tensor, body: Buffer) -> torch.Tensor:
        """Run the passes of a step. Returns hidden states ``(positions, hidden)``, or on the last
        stage logits ``(draws, vocabulary)`` by their places in the step's tensor."""
        given = from_wire(tensor, body, self.device)
        given = given.long() if self.first else given.to(self.dtype)
        count = tensor.shape[0]
        hidden = (
            None
            if self.last
            else torch.empty(count, self.hidden_size, dtype=self.dtype, device=self.device)
        )
        drawn: list[tuple[tuple[int, ...], torch.Tensor]] = []
        for part in passes:
            places = torch.tensor(part.places, device=self.device)
            output = self._run(part, given[places])
            if hidden is not None:
                hidden[places] = output
            elif part.decodes:
                drawn.append((part.places, output))
        return self._in_order(drawn) if hidden is None else hidden

    def _in_order(self, drawn: Sequence[tuple[tuple[int, ...], torch.Tensor]]) -> torch.Tensor:
        if not drawn:
            return torch.empty(0, self.vocabulary, device=self.device)
        logits = torch.cat([output for _, output in drawn])
        places = torch.tensor([place for part, _ in drawn for place in part])
        return logits[places.argsort().to(self.device)]

    def _run(self, part: Pass, inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states ``(positions, hidden)``, or logits ``(entries, vocabulary)``."""
        from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

        layout = layout_of(part.entries)
        given = None
        if not self.first:
            # They are whole already: what a layer adds to is in `hidden_states`.
            tensors = {"hidden_states": inputs, "residual": torch.zeros_like(inputs)}
            given = PPProxyTensors(tensors)
        with torch.no_grad():
            batch = self._batch(layout, part.decodes, inputs)
            output = self._runner.forward(batch, pp_proxy_tensors=given).logits_output
        if self.last:
            logits: torch.Tensor = output.next_token_logits
            return logits[:, : self.vocabulary]
        tensors = output.tensors
        if not tensors.keys() <= SENT:
            names = ", ".join(sorted(tensors.keys() - SENT))
            raise ExecutorError(f"its stages hand on more than a hidden state: {names}")
        hidden: torch.Tensor = tensors["hidden_states"]
        return hidden + tensors["residual"] if "residual" in tensors else hidden

    def _batch(self, layout: Layout, decodes: bool, inputs: torch.Tensor) -> Any:
        """SGLang's `ForwardBatch`, made without any of the requests that its scheduler has."""
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        runner, device, count = self._runner, self.device, len(layout.ends)
        ends = torch.from_numpy(layout.ends)
        tokens = inputs if self.first else torch.zeros(len(inputs), dtype=torch.long, device=device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE if decodes else ForwardMode.EXTEND,
            batch_size=count,
            input_ids=tokens,
            req_pool_indices=self._write_tables(layout),
            seq_lens=ends.to(device),
            out_cache_loc=torch.from_numpy(layout.slots).to(device),
            seq_lens_sum=int(layout.ends.sum()),
            seq_lens_cpu=ends,
            orig_seq_lens=ends.to(device, torch.int32),
            spec_algorithm=SpeculativeAlgorithm.NONE,
            capture_hidden_mode=CaptureHiddenMode.NULL,
            rids=[str(row) for row in range(count)],
            lora_ids=[None] * count,
        )
        runner.kv_index_translator.own_plan(batch).bind(batch, runner.kv_index_translator)
        batch._init_num_token_non_padded(device=device, is_draft_worker=False)
        if decodes:
            batch.positions = batch.seq_lens - 1
        else:
            self._extend(batch, layout)
        return batch

    def _extend(self, batch: Any, layout: Layout) -> None:
        from sglang.srt.model_executor.forward_batch_info import compute_position

        counts, begins = layout.counts.tolist(), layout.begins.tolist()
        batch.extend_seq_lens = torch.tensor(counts, dtype=torch.int32, device=self.device)
        batch.extend_prefix_lens = torch.tensor(begins, dtype=torch.int32, device=self.device)
        batch.extend_seq_lens_cpu, batch.extend_prefix_lens_cpu = counts, begins
        batch.extend_num_tokens = sum(counts)
        batch.extend_logprob_start_lens_cpu = [0] * len(counts)
        batch.positions, batch.extend_start_loc = compute_position(
            self._runner.prefill_attention_backend_str,
            batch.extend_prefix_lens,
            batch.extend_seq_lens,
            sum(counts),
        )

    def _write_tables(self, layout: Layout) -> torch.Tensor:
        """Tell the slots of every entry's positions; returns the rows where they stand."""
        rows, pages = layout.tables.shape
        table = self._runner.req_to_token_pool.req_to_token
        places = torch.arange(BLOCK_TOKENS, dtype=torch.int32, device=self.device)
        first = torch.from_numpy(layout.tables).to(self.device, torch.int32) * BLOCK_TOKENS
        slots = (first[:, :, None] + places).flatten(1)
        # The context need not be whole pages. Row 0 is for padding.
        width = min(pages * BLOCK_TOKENS, table.shape[1])
        table[1 : rows + 1, :width] = slots[:, :width]
        return torch.arange(1, rows + 1, device=self.device)

    def _try(self) -> None:
        """Fill and decode in the first block, which nobody has been granted yet.

        Raises `ExecutorError` unless what comes of it has the right shape.
        """
        count = TRIAL_TOKENS
        passes = [
            Pass(False, (Entry(0, count - 1, (0,)),), tuple(range(count - 1))),
            Pass(True, (Entry(count - 1, 1, (0,)),), (count - 1,)),
        ]
        if self.first:
            tensor, body = Tensor("i32", (count,)), bytes(4 * count)
        else:
            ones = torch.ones(count, self.hidden_size)
            tensor, body = Tensor("f32", tuple(ones.shape)), ones.numpy().tobytes()
        output = self.forward(passes, tensor, body)
        shape = (1, self.vocabulary) if self.last else (count, self.hidden_size)
        if tuple(output.shape) != shape:
            raise ExecutorError(f"a trial gave {tuple(output.shape)} numbers, and not {shape}")


def _drop_unused_head(model: nn.Module, last: bool) -> None:
    """Some models make a projection on every stage, and only the last one has weights for it."""
    from sglang.srt.layers.utils import PPMissingLayer

    if not last and isinstance(getattr(model, "lm_head", None), nn.Module):
        model.lm_head = PPMissingLayer()


def _check_weights(model: nn.Module) -> None:
    """Raises `ExecutorError` where the checkpoint lacks tensors: nothing has been written there."""
    lacking = [name for name, value in model.named_parameters() if _is_lacking(value)]
    if lacking:
        more = f" and {len(lacking) - LISTED_NAMES} more" if len(lacking) > LISTED_NAMES else ""
        names = ", ".join(sorted(lacking)[:LISTED_NAMES]) + more
        raise ExecutorError(f"the checkpoint lacks all or parts of {names}")


def _is_lacking(value: torch.Tensor) -> bool:
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not value.numel():
        return False
    empty = torch.isnan(value) if value.ndim < 2 else torch.isnan(value).flatten(1).all(dim=1)
    # Of stacked experts each is a tensor of its own.
    most = 0.0 if value.ndim > 2 else MOST_ROWS_LOST
    return bool(empty.float().mean() > most)


def _buffers_of(pool: Any) -> list[torch.Tensor]:
    """``(slots, ...)`` of every layer. Raises `ExecutorError` for a pool that has something else
    besides keys and values by slot."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

    if type(pool) is MHATokenToKVPool and not pool.use_hnd:
        return [*pool.k_buffer, *pool.v_buffer]
    if type(pool) is MLATokenToKVPool:
        return list(pool.kv_buffer)
    raise ExecutorError(f"it keeps KV in a {type(pool).__name__}, which pxd does not know")
