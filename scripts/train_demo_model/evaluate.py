"""Greedy accuracy of a checkpoint, task by task: ``python evaluate.py DIR --count 40``.

Runs on mlx-lm (batched), with questions from a seed that training never uses.
Each task is asked plainly, in varied form after a system message, and after some
answered turns; the columns are in this order.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mlx.core as mx
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from tasks import TASKS, ConversationState, Turn, history_turn, rephrase, sample_conversation
from texts import SYSTEM_MESSAGES


@dataclass(frozen=True)
class Case:
    """One chat to complete and the right answer."""

    messages: list[dict[str, str]]
    answer: str


def plain_case(rng: Random, turn: Turn) -> Case:
    """The question alone, in its plain form."""
    del rng
    return Case([{"role": "user", "content": turn.question}], turn.answer)


def varied_case(rng: Random, turn: Turn) -> Case:
    """The question with changed case, punctuation or politeness, after a system message."""
    system = {"role": "system", "content": rng.choice(SYSTEM_MESSAGES)}
    return Case([system, {"role": "user", "content": rephrase(rng, turn)}], turn.answer)


def history_case(rng: Random, turn: Turn) -> Case:
    """The question after two or three answered turns."""
    history = sample_conversation(rng, rng.randint(2, 3))
    messages = [{"role": m.role, "content": m.content} for m in history]
    return Case([*messages, {"role": "user", "content": turn.question}], turn.answer)


def recall_cases(rng: Random, count: int) -> list[Case]:
    """Questions that only the history answers."""
    cases: list[Case] = []
    while len(cases) < count:
        state, messages = ConversationState(), []
        for last in (False, False, False, True):
            turn = history_turn(rng, state)
            if turn is None:
                continue
            state.last = turn
            if last and messages:
                cases.append(
                    Case([*messages, {"role": "user", "content": turn.question}], turn.answer)
                )
            messages += [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
    return cases


def generate(model: object, tokenizer: object, cases: list[Case], max_tokens: int) -> list[str]:
    """Greedy answers, decoded together in one batch."""
    prompts = [
        tokenizer.apply_chat_template(case.messages, add_generation_prompt=True) for case in cases
    ]
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[token] for token in tokenizer.eos_token_ids],
        completion_batch_size=64,
        prefill_batch_size=64,
    )
    uids = generator.insert(prompts)
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                tokens[response.uid].append(response.token)
    return [tokenizer.decode(tokens[uid]) for uid in uids]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--count", type=int, default=40, help="questions per task")
    parser.add_argument("--seed", type=int, default=987_654_321)
    parser.add_argument(
        "--float32", action="store_true", help="compute in float32, not in the stored bfloat16"
    )
    parser.add_argument("--show", type=int, default=2, help="wrong answers to show per task")
    options = parser.parse_args()

    model, tokenizer = load(str(options.checkpoint))
    if options.float32:
        model.set_dtype(mx.float32)
    forms = {"plain": plain_case, "varied": varied_case, "history": history_case}
    rng = Random(options.seed)
    groups: dict[tuple[str, str], list[Case]] = {
        (name, form): [make(rng, task(rng)) for _ in range(options.count)]
        for name, (task, _) in TASKS.items()
        for form, make in forms.items()
    }
    groups["recall", "history"] = recall_cases(rng, options.count)

    # All in one run: the generator keeps its batch full, whatever the lengths of the answers.
    every = [case for cases in groups.values() for case in cases]
    answers = iter(generate(model, tokenizer, every, max_tokens=160))
    accuracy: dict[tuple[str, str], float] = {}
    wrong: list[str] = []
    for (name, form), cases in groups.items():
        results = [(case, next(answers)) for case in cases]
        failed = [(case, given) for case, given in results if given != case.answer]
        accuracy[name, form] = 1 - len(failed) / len(cases)
        for case, given in failed[: options.show]:
            question = case.messages[-1]["content"]
            wrong.append(f"{name}/{form}: {question!r} -> {given[:80]!r}, right: {case.answer!r}")
        if form == "history":
            row = " ".join(
                f"{100 * accuracy[name, f]:6.1f}" if (name, f) in accuracy else "     -"
                for f in forms
            )
            print(f"{name:16s}{row}", flush=True)
    for form in forms:
        values = [value for (_, f), value in accuracy.items() if f == form]
        print(f"mean {form}: {100 * sum(values) / len(values):.2f} %")
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
