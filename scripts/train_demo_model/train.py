"""Train the demo model from nothing: ``python train.py --out DIR --steps 4000 --seed 0``.

Needs torch (the ``torch`` extra), tokenizers and safetensors.  The number of steps,
not the time, sets the schedule, so that a second run on the same machine with the
same versions sees the same batches at the same learning rates.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from network import MAX_POSITIONS, Qwen3, Qwen3Config
from safetensors.torch import load_file, save_file
from tasks import WEIGHTS, sample_conversation
from tokenizer import ASSISTANT, END, build_tokenizer, render, save_tokenizer
from tokenizers import Tokenizer
from torch import Tensor

MUON_RATE, ADAM_RATE = 0.02, 3e-3
#: Rows x tokens of a batch, and how often: the long rows teach long conversations and prompts.
SHAPES: dict[tuple[int, int], float] = {(16, 128): 0.82, (5, 384): 0.14, (1, 1024): 0.04}

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Muon:
    """Muon (momentum orthogonalised by Newton-Schulz) over stacks of equally shaped matrices.

    Stacking the layers' matrices makes one batched product out of many small ones,
    which is what makes it affordable on a CPU.
    """

    def __init__(
        self, matrices: list[torch.nn.Parameter], momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        self.groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            self.groups.setdefault(matrix.shape, []).append(matrix)
        self.buffers = {
            shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()
        }
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Update every matrix and drop its gradient."""
        for shape, group in self.groups.items():
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            buffer = self.buffers[shape].mul_(self.momentum).add_(gradient)
            update = orthogonalise(gradient + self.momentum * buffer)
            scale = rate * max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, direction in zip(group, update, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(direction, alpha=-scale)
                parameter.grad = None


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest (semi-)orthogonal matrices, by the quintic Newton-Schulz iteration."""
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def sample_lengths(rng: Random) -> int:
    """The number of turns of a conversation: mostly one, some two or three, few many."""
    return rng.choices(
        [1, 2, 3, rng.randint(4, 8), rng.randint(9, 24)], [0.5, 0.2, 0.15, 0.12, 0.03]
    )[0]


def encoded_conversations(
    tokenizer: Tokenizer, rng: Random, weights: dict[str, float]
) -> Iterator[list[int]]:
    """Tokenised conversations without end."""
    while True:
        texts = [render(sample_conversation(rng, sample_lengths(rng), weights)) for _ in range(512)]
        for encoding in tokenizer.encode_batch(texts):
            yield encoding.ids


class Packer:
    """Packs whole conversations into rows of given lengths."""

    def __init__(self, source: Iterator[list[int]], longest: int) -> None:
        self.source, self.longest = source, longest
        self.waiting: list[list[int]] = []

    def _refill(self, space: int) -> None:
        """Have some conversations that fit; forget the oldest where too many long ones wait."""
        while sum(len(ids) <= space for ids in self.waiting) < 24:
            ids = next(self.source)
            if len(ids) <= self.longest:
                self.waiting.append(ids)
        del self.waiting[:-256]

    def row(self, length: int) -> list[list[int]]:
        """Conversations that fill a row: the longest that fits first, then in order of arrival."""
        chosen: list[list[int]] = []
        space = length
        self._refill(space)
        while fitting := [i for i, ids in enumerate(self.waiting) if len(ids) <= space]:
            pick = fitting[0] if chosen else max(fitting, key=lambda i: len(self.waiting[i]))
            chosen.append(self.waiting.pop(pick))
            space -= len(chosen[-1])
        return chosen


def batches(tokenizer: Tokenizer, rng: Random, weights: dict[str, float]) -> Iterator[Batch]:
    """Packed rows without end: inputs, attention mask, targets, counted positions."""
    assistant, end = tokenizer.token_to_id(ASSISTANT), tokenizer.token_to_id(END)
    packer = Packer(encoded_conversations(tokenizer, rng, weights), longest=1024)
    while True:
        rows, length = rng.choices(list(SHAPES), list(SHAPES.values()))[0]
        tokens = torch.full((rows, length + 1), end)
        document = torch.zeros((rows, length), dtype=torch.int32)
        counted = torch.zeros((rows, length), dtype=torch.bool)
        for row in range(rows):
            start = 0
            for number, ids in enumerate(packer.row(length), 1):
                tokens[row, start : start + len(ids)] = torch.tensor(ids)
                document[row, start : start + len(ids)] = number
                answering = False
                for i, token in enumerate(ids):
                    # Counted are the positions whose next token belongs to an answer or ends it.
                    answering = token == assistant or (answering and token != end)
                    counted[row, start + i] = answering
                start += len(ids)
        allowed = (document[:, None, :, None] == document[:, None, None, :]) & torch.ones(
            length, length
        ).bool().tril()
        yield tokens[:, :-1], torch.where(allowed, 0.0, -1e9), tokens[:, 1:], counted


def rate_factor(step: int, steps: int, resumed: bool) -> float:
    """Warm-up, constant, then linear decay; a resumed run only decays, from a lower rate."""
    progress = step / steps
    if resumed:
        decay = max(0.01, 0.5 * (1 - progress))
    else:
        decay = 1.0 if progress < 0.4 else max(0.01, (1 - progress) / 0.6)
    return min(1.0, (step + 1) / 30) * decay


def save(model: Qwen3, config: Qwen3Config, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint in Hugging Face layout."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"model.{name}": value.detach().to(torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n")
    generation = {
        "do_sample": False,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.eos_token_id,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, out, MAX_POSITIONS)


@dataclass(frozen=True)
class Options:
    """What a run needs to know."""

    out: Path
    steps: int
    seed: int
    threads: int
    compile: bool
    save_every: int
    start: Path | None
    weight: list[tuple[str, float]]


def train(options: Options) -> None:
    """Train for a fixed number of steps and write the checkpoint (and some on the way)."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(), eos_token_id=tokenizer.token_to_id(END)
    )
    model = Qwen3(config)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"vocabulary {config.vocab_size}, parameters {parameters:,}", flush=True)
    if options.start is not None:
        stored = load_file(options.start / "model.safetensors")
        model.load_state_dict({k.removeprefix("model."): v.float() for k, v in stored.items()})
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon, adam = (
        Muon(matrices),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    )
    # Compiling takes a good minute per shape, so only the most frequent shape is compiled.
    common = max(SHAPES, key=lambda shape: SHAPES[shape])
    fast = torch.compile(model, dynamic=False) if options.compile else model
    started, average, all_tokens, counted_tokens = time.time(), 0.0, 0, 0
    for step, (tokens, mask, targets, counted) in enumerate(
        batches(tokenizer, Random(options.seed + 1), WEIGHTS | dict(options.weight))
    ):
        if step == options.steps:
            break
        factor = rate_factor(step, options.steps, resumed=options.start is not None)
        forward = fast if tuple(tokens.shape) == common else model
        loss = model.loss(forward(tokens, mask), targets, counted)
        loss.backward()
        muon.step(MUON_RATE * factor)
        adam.param_groups[0]["lr"] = ADAM_RATE * factor
        adam.step()
        adam.zero_grad()
        all_tokens += tokens.numel()
        counted_tokens += int(counted.sum())
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            seconds = time.time() - started
            print(
                f"step {step + 1} loss {average:.4f} tokens {all_tokens:,} "
                f"answer tokens {counted_tokens:,} seconds {seconds:.0f}",
                flush=True,
            )
        if options.save_every and (step + 1) % options.save_every == 0:
            save(model, config, tokenizer, options.out / f"step{step + 1}")
    save(model, config, tokenizer, options.out)


def task_weight(text: str) -> tuple[str, float]:
    """Parse ``TASK=WEIGHT``."""
    name, _, value = text.partition("=")
    if name not in WEIGHTS:
        raise argparse.ArgumentTypeError(f"unknown task {name!r}")
    return name, float(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--save-every", type=int, default=0, help="also save every so many steps")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from (use another seed)")
    parser.add_argument(
        "--weight",
        type=task_weight,
        action="append",
        default=[],
        metavar="TASK=WEIGHT",
        help="how often to draw a task, instead of its usual weight (repeatable)",
    )
    train(Options(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
