"""Checks one architecture: any pipeline and any batch must give what mlx-lm gives for one request.

    python -m tests.executors.architecture_check ARCHITECTURE DIRECTORY [--dtype …] [--quantize 4] …

Runs in a process of its own for the reason given in `tests.tiny_models`. Exits 0 if all is well.
"""

import argparse
import gc
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import msgspec
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from pxd.executors.mlx.batch import can_take_back
from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.mlx.loader import load_stage
from pxd.executors.mlx.prefixes import can_share_prefixes
from pxd.executors.mlx.skeleton import model_classes
from pxd.executors.mlx.trial import supports_batches, supports_guesses
from pxd.executors.protocol import ExecutorError, LoadSpec, ModelDescription
from pxd.models.describe import describe_checkpoint
from tests.executors.architecture_table import REASON_CHARACTERS, Row
from tests.executors.pipeline import Pipeline
from tests.models.files import keep_part
from tests.tiny_configs import CONFIGS
from tests.tiny_models import QUANTIZATIONS, VOCABULARY, make_in_process

# Longer than the sliding windows of the tiny models, and the shortest there is.
PROMPTS = [list(range(5, 40)), [77]]
COUNT = 10
CHUNK = 16
"""Of the prompts of batches. There is a model whose answers depend on it."""


def choose_cuts(description: ModelDescription) -> list[list[int]]:
    """No cut, one and two; with two the outer stages are as small as they can be."""
    splits = list(description.splits)
    if not splits:
        return [[]]
    return [[], [splits[len(splits) // 2]], [splits[0], splits[-1]]]


class Subject:
    """A model: in one piece as mlx-lm runs it, and as pipelines, which all checks share."""

    def __init__(self, path: Path, description: ModelDescription) -> None:
        self.path, self.description = path, description
        self.model: Any = load_model(path)[0]
        self.pipelines = [
            (cuts, Pipeline.load(path, description.layers, cuts))
            for cuts in choose_cuts(description)
        ]
        self._answers: dict[tuple[tuple[int, ...], int, int], list[int]] = {}

    def expected(self, prompt: Sequence[int], count: int, chunk: int = 2048) -> list[int]:
        key = tuple(prompt), count, chunk
        if key not in self._answers:
            generated = generate_step(
                mx.array(key[0]), self.model, max_tokens=count, prefill_step_size=chunk
            )
            self._answers[key] = [token for token, _ in generated]
        return self._answers[key]


def check_alone(subject: Subject) -> None:
    for cuts, pipeline in subject.pipelines:
        for prompt in PROMPTS:
            for chunk in (2048, 7):
                wanted = subject.expected(prompt, COUNT, chunk)
                got = pipeline.generate(prompt, COUNT, chunk=chunk)
                assert got == wanted, f"cuts {cuts}, chunk {chunk}: {got}, not {wanted}"


def check_fetched(subject: Subject) -> None:
    """Stages in directories that hold nothing but what a stage fetches from other nodes."""
    path, layers = subject.path, subject.description.layers
    checkpoint = describe_checkpoint(path)
    bounds = [0, *choose_cuts(subject.description)[-1], layers]
    engines = []
    with TemporaryDirectory() as root:
        for start, end in itertools.pairwise(bounds):
            tensors = checkpoint.tensors_for(start, end)
            part = keep_part("m", path, Path(root) / f"{start}", tensors)
            assert describe_checkpoint(part).absent == checkpoint.shards.keys() - tensors
            engine = MlxEngine()
            mark = checkpoint.fingerprint
            spec = LoadSpec(path=str(part), start=start, end=end, fingerprint=mark)
            engine.load(spec, lambda _: None)
            engines.append(engine)
        got = Pipeline(engines).generate(PROMPTS[0], COUNT)
    assert got == subject.expected(PROMPTS[0], COUNT)


def check_numbers(subject: Subject) -> None:
    """Logits at every position of a chunked prompt, bit by bit: tokens alone may hide much."""
    path, description, model = subject.path, subject.description, subject.model
    checkpoint = describe_checkpoint(path)
    widths = {description.hidden_size} if not description.splits else set()
    for cuts in [[cut] for cut in description.splits] + choose_cuts(description)[2:]:
        bounds = [0, *cuts, description.layers]
        stages = [
            load_stage(path, checkpoint, start, end, lambda _: None).stage
            for start, end in itertools.pairwise(bounds)
        ]
        dtype = getattr(mx, checkpoint.dtype)
        widths |= {stage.width(dtype, incoming=False) for stage in stages[:-1]}
        whole = make_prompt_cache(model)
        parts = [stage.make_caches() for stage in stages]
        for begin, end in ((0, 20), (20, 21), (21, 35)):
            tokens = mx.array([PROMPTS[0][begin:end]])
            wanted = model(tokens, cache=whole)
            # Some models bar tokens with minus infinity.
            finite = mx.isfinite(mx.logsumexp(wanted, axis=-1))
            assert finite.all().item(), "the whole model computes no numbers"
            got = tokens
            for stage, caches in zip(stages, parts, strict=True):
                got = stage.forward(got, caches)
            assert mx.array_equal(got, wanted).item(), f"cuts {cuts}, positions {begin} to {end}"
    assert max(widths) == description.hidden_size, widths


class Crowd:
    """Several requests in one pipeline, each remembering what it got."""

    def __init__(self, pipeline: Pipeline, prompts: dict[int, list[int]]) -> None:
        self.pipeline, self.prompts = pipeline, prompts
        self.sequences = {number: list(prompt) for number, prompt in prompts.items()}

    def join(self, *numbers: int) -> None:
        for number in numbers:
            self.pipeline.prefill(number, self.prompts[number], chunk=CHUNK)

    def decode(self, *numbers: int) -> None:
        rows = [
            (number, len(self.sequences[number]) - 1, self.sequences[number][-1:], True)
            for number in numbers
        ]
        for number, token in zip(numbers, self.pipeline.step(rows), strict=True):
            self.sequences[number].append(token)

    def answer(self, number: int) -> list[int]:
        return self.sequences[number][len(self.prompts[number]) :]


def check_batches(subject: Subject) -> None:
    """Requests of different lengths join, change places, pause, are cancelled and rejoin."""
    prompts = {1: list(range(5, 30)), 2: list(range(40, 52)), 3: [7, 9, 11], 4: [8] * 40, 5: [3]}
    crowd = Crowd(subject.pipelines[-1][1], prompts)
    crowd.join(1, 2, 3)
    crowd.decode(1, 2)
    crowd.decode(1, 2, 3)
    crowd.decode(3, 1, 2)
    crowd.join(4)
    crowd.decode(4, 3, 2, 1, 5)
    crowd.decode(1)
    crowd.decode(5, 1)
    crowd.pipeline.release([2])
    for _ in range(4):
        crowd.decode(3, 4, 5)
        crowd.decode(1)
    crowd.decode(1, 3)
    crowd.decode(4, 5)
    for _ in range(3):
        crowd.decode(1, 5, 4, 3)
    for number, prompt in prompts.items():
        got = crowd.answer(number)
        wanted = subject.expected(prompt, len(got), CHUNK)
        assert got == wanted, f"request {number}: {got}, not {wanted}"
    crowd.pipeline.release(list(prompts))


def check_random_batches(subject: Subject) -> None:
    """Any subset may decode next, in any order; requests end and new ones take their place."""
    chance = random.Random(17)
    crowd = Crowd(subject.pipelines[-1][1], {})

    def check(number: int) -> None:
        got = crowd.answer(number)
        wanted = subject.expected(crowd.prompts[number], len(got), CHUNK)
        assert got == wanted, f"request {number} at random: {got}, not {wanted}"

    running: list[int] = []
    for number in range(9):
        length = chance.randrange(1, 20)
        crowd.prompts[number] = [chance.randrange(VOCABULARY) for _ in range(length)]
        crowd.sequences[number] = list(crowd.prompts[number])
        crowd.join(number)
        running.append(number)
        if len(running) > 5:
            ended = running.pop(chance.randrange(len(running)))
            check(ended)
            crowd.pipeline.release([ended])
        for _ in range(4):
            crowd.decode(*chance.sample(running, chance.randint(1, len(running))))
    for number in running:
        check(number)
    crowd.pipeline.release(running)


# Whose caches keep all positions, and so can forget the last ones.
TRIMS = {"qwen3", "llama", "qwen3_moe", "mixtral", "deepseek_v2", "deepseek_v3", "gemma2"}


def check_guesses(subject: Subject, *, trims: bool) -> None:
    """Several positions in one pass, of which those behind a wrong guess are taken back."""
    for cuts, pipeline in subject.pipelines:
        assert pipeline.trims == trims, f"cuts {cuts}: {pipeline.trims}"
        for number, prompt in enumerate(PROMPTS if trims else ()):
            text = prompt + subject.expected(prompt, 24)
            pipeline.prefill(number, prompt)
            place = len(prompt) - 1
            for count, right in ((5, 5), (9, 2), (3, 1), (1, 1), (16, 7), (4, 4)):
                wrong = [(token + 1) % VOCABULARY for token in text[place + right :]]
                tokens = [*text[place : place + right], *wrong][:count]
                drawn = pipeline.step([(number, place, tokens, count)])
                wanted = text[place + 1 : place + 1 + right]
                assert list(drawn[:right]) == wanted, f"cuts {cuts}: {drawn}, not {wanted}"
                place += right
            pipeline.release([number])


def try_out(architecture: str, directory: Path) -> Row:
    """What the table says about it. Raises `AssertionError` where stages compute otherwise."""
    try:
        model_classes(CONFIGS[architecture])
        path = make_in_process(architecture, directory)
        description = describe(path)
    except ExecutorError as error:
        return Row(name=architecture, reason=str(error)[:REASON_CHARACTERS])
    subject = Subject(path, description)
    check_alone(subject)
    check_numbers(subject)
    check_batches(subject)
    check_random_batches(subject)
    whole = load_stage(path, describe_checkpoint(path), 0, description.layers, lambda _: None)
    caches = whole.stage.make_caches()
    guesses = can_take_back(caches) and supports_guesses(whole.stage, whole.dtype)
    check_guesses(subject, trims=guesses)
    return Row(
        name=architecture,
        layers=description.layers,
        cuts=description.splits,
        batches=supports_batches(whole.stage, whole.dtype),
        prefixes=can_share_prefixes(caches),
        guesses=guesses,
        reason=description.unsupported,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--quantize", default="", choices=QUANTIZATIONS)
    parser.add_argument("--splits", default="1,2,3,4,5", help="cuts that must be allowed")
    parser.add_argument("--row", action="store_true", help="print what the table says of it")
    arguments = parser.parse_args()
    if arguments.row:
        print(msgspec.json.encode(try_out(arguments.architecture, arguments.directory)).decode())
        return
    path = make_in_process(
        arguments.architecture,
        arguments.directory,
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        shards=arguments.shards,
    )
    description = describe(path)
    assert ",".join(map(str, description.splits)) == arguments.splits, description
    assert bool(description.unsupported) == (not description.splits), description
    subject = Subject(path, description)
    check_alone(subject)
    check_fetched(subject)
    check_numbers(subject)
    # In less precision a batch may break near-ties otherwise than a single row.
    if arguments.dtype == "float32" and not arguments.quantize:
        check_batches(subject)
        check_random_batches(subject)
        check_guesses(subject, trims=arguments.architecture in TRIMS)


if __name__ == "__main__":
    # Loading collects garbage each time, and what was imported is none.
    gc.freeze()
    main()
