"""Decodes one request over two stages in one process, with nothing of pxd but its MLX engine.

    python -m scripts.benchmarks.forward MODEL LAYERS CUT PROMPT ANSWER

Prints the seconds per token, as the median of the steps.
"""

import statistics
import sys
import time
from pathlib import Path

from tests.executors.pipeline import Pipeline


def main(model: str, layers: str, cut: str, prompt: str, answer: str) -> None:
    pipeline = Pipeline.load(Path(model), int(layers), [int(cut)])
    tokens, spent = list(range(int(prompt))), []
    pipeline.prefill(1, tokens)
    for position in range(int(prompt) - 1, int(prompt) + int(answer) - 1):
        began = time.perf_counter()
        pipeline.step([(1, position, [position % 10], True)])
        spent.append(time.perf_counter() - began)
    print(statistics.median(spent))


if __name__ == "__main__":
    main(*sys.argv[1:])
