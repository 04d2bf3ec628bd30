"""What guessing gains over slow links: python -m tests.executors.speculation_gain MODEL_DIR

One request alone in a pipeline of engines in this process. Every hop, the way back included, takes
some milliseconds more: that much is slept. Prints tokens per second without and with guesses.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoTokenizer

from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import NewRequest, PlannedStep, Scheduler
from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec
from pxd.wire import MAX_GUESSES, SampledToken, Sampling
from tests.executors.steps import sampled_tokens, wire_step

DELAYS_MS = (0, 5, 20, 80)
COUNT = {"role": "user", "content": "Count from 1 to 20."}
NUMBERS = {"role": "assistant", "content": ", ".join(str(i) for i in range(1, 21))}
CONVERSATIONS = {
    "repetitive": [COUNT, NUMBERS, COUNT],
    "other": [{"role": "user", "content": "Tell me a story."}],
}
"""The first asks again what has been answered already."""


class DelayedPipeline:
    def __init__(self, path: Path, stages: int) -> None:
        layers = describe(path).layers
        bounds = [layers * i // stages for i in range(stages + 1)]
        self.engines = [MlxEngine() for _ in range(stages)]
        for engine, start, end in zip(self.engines, bounds, bounds[1:], strict=False):
            engine.load(LoadSpec(path=str(path), start=start, end=end), lambda _: None)
        self.delay_s = 0.0
        self.session = 0

    def run(self, planned: PlannedStep) -> list[SampledToken]:
        step, body = wire_step(planned, self.session)
        output: Any = ()
        for engine in self.engines:
            output = engine.step(step, body)
            time.sleep(self.delay_s)
            if engine is not self.engines[-1]:
                tensor, body = output
                step = msgspec.structs.replace(step, tensor=tensor)
        return sampled_tokens(planned, output)

    def answer(
        self, prompt: Sequence[int], count: int, guesses: int
    ) -> tuple[list[int], int, float]:
        """Greedy tokens, passes and seconds from the first token on."""
        self.session += 1
        policy = Continuous(ContinuousConfig(kv_tokens=8192))
        policy.guesses = guesses
        scheduler = Scheduler(policy)
        scheduler.add(
            NewRequest(number=0, tokens=prompt, max_new=count, sampling=Sampling(temperature=0))
        )
        tokens: list[int] = []
        passes, began = 0, 0.0
        while (step := scheduler.next_step()) is not None:
            for result in scheduler.step_done(step.number, self.run(step)):
                began = began if tokens else time.perf_counter()
                tokens += result.tokens
                passes += 1
        return tokens, passes, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--stages", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60)
    arguments = parser.parse_args()
    pipeline = DelayedPipeline(arguments.model, arguments.stages)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    print(f"{'prompt':12} {'ms a hop':>8} {'plain':>8} {'guessing':>8} {'gain':>6} {'passes':>7}")
    for name, messages in CONVERSATIONS.items():
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        for delay in DELAYS_MS:
            pipeline.delay_s = delay / 1000
            plain, _, plain_s = pipeline.answer(prompt, arguments.tokens, 0)
            guessed, passes, guessed_s = pipeline.answer(prompt, arguments.tokens, MAX_GUESSES)
            assert guessed == plain
            rates = [(len(plain) - 1) / seconds for seconds in (plain_s, guessed_s)]
            print(
                f"{name:12} {delay:8} {rates[0]:8.1f} {rates[1]:8.1f} "
                f"{rates[1] / rates[0]:5.2f}x {passes:7}"
            )


if __name__ == "__main__":
    main()
