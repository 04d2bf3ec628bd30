"""What the last stage is told of a request's tokens when it opens."""

from collections import Counter
from itertools import accumulate

from pxd import wire
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import MAX_OPENING_COST, Generated, NewRequest, PlannedStep, Scheduler
from pxd.wire import MAX_HISTORY, History, Logprobs, SampledToken, Sampling

PENALTY = Sampling(temperature=0, repetition_penalty=1.2)


def told(history: History | None) -> tuple[set[int], Counter[int]]:
    assert history is not None
    return set(accumulate(history.prompt)), Counter(accumulate(history.answer))


def frame(step: PlannedStep) -> wire.Step:
    return wire.Step(
        pipeline="p" * 64,
        session=1,
        step=step.number,
        rows=step.rows,
        tensor=wire.Tensor("i32", (len(step.tokens),)),
        openings=step.openings,
        grants=step.grants,
        releases=step.releases,
    )


def test_a_request_that_comes_back_says_what_is_answer_already() -> None:
    """Both one that was resubmitted by its ingress and one that had to make room."""
    config = ContinuousConfig(kv_tokens=3 * BLOCK_TOKENS, admission="preempt", prefix_cache=False)
    scheduler = Scheduler(Continuous(config))
    prompts = {0: [1, 1, 2], 1: [5, 6, 7, 8]}
    for number, generated in ((0, 0), (1, 2)):
        scheduler.add(
            NewRequest(
                number=number,
                tokens=prompts[number],
                max_new=2 * BLOCK_TOKENS,
                generated=generated,
                sampling=PENALTY,
            )
        )
    answers = {0: [], 1: prompts[1][2:]}
    openings = Counter[int]()
    while (step := scheduler.next_step()) is not None:
        for opening in step.openings:
            openings[opening.request] += 1
            prompt = {0: {1, 2}, 1: {5, 6}}[opening.request]
            assert told(opening.history) == (prompt, Counter(answers[opening.request]))
        drawn = [SampledToken(r.request, r.position + 1, r.position) for r in step.rows if r.draws]
        for result in scheduler.step_done(step.number, drawn):
            answers[result.request] += result.tokens
    assert openings == {0: 1, 1: 2}
    assert {number: len(answer) for number, answer in answers.items()} == {0: 128, 1: 130}


def test_a_step_opens_only_as_many_as_its_header_can_tell_of() -> None:
    size = 20_000
    config = ContinuousConfig(kv_tokens=128 * size, prefill_chunk=16)
    scheduler = Scheduler(Continuous(config))
    bias = tuple((token, 0.5) for token in range(100_000, 100_000 + wire.MAX_BIASES))
    for number in range(80):
        scheduler.add(
            NewRequest(
                number=number,
                tokens=range(7 * number, 7 * number + 7 * size, 7),
                max_new=10,
                sampling=Sampling(presence_penalty=1, repetition_penalty=1.1, logit_bias=bias),
            )
        )
    opened: list[int] = []
    while len(opened) < 80:
        step = scheduler.next_step()
        assert step is not None
        assert step.openings
        opened += [opening.request for opening in step.openings]
        wire.encode(frame(step), 4 * len(step.tokens))
        scheduler.step_done(step.number, [])
    assert opened == list(range(80))


def test_the_largest_history_fits_into_a_header_that_is_full_otherwise() -> None:
    half = MAX_HISTORY // 2
    sampling = Sampling(
        logit_bias=tuple((token, 0.5) for token in range(1 << 30, (1 << 30) + wire.MAX_BIASES)),
        barred=tuple(range(1 << 30, (1 << 30) + wire.MAX_ENDS)),
    )
    openings = [
        wire.Opening(1, sampling, 0, (), History(prompt=(127,) * MAX_OPENING_COST)),
        wire.Opening(2, sampling, 0, (1 << 40,) * 8192, History((2,) * half, (2,) * half)),
    ]
    rows = [wire.Row(request, 100_000, 1, 1) for request in range(256)]
    step = PlannedStep(1, tuple(rows), (1,) * 256, tuple(openings), ())
    wire.encode(frame(step), 1024)


def test_log_probabilities_go_with_their_token() -> None:
    scheduler = Scheduler(Continuous(ContinuousConfig(kv_tokens=1024)))
    scheduler.add(
        NewRequest(
            number=0, tokens=[1], max_new=2, sampling=Sampling(logprobs=1), eos=frozenset({9})
        )
    )
    scores = Logprobs(-0.5, ((4, -0.5),))
    for token, expected in (
        (4, Generated(0, (4,), None, (scores,))),
        (9, Generated(0, (), "stop")),
    ):
        step = scheduler.next_step()
        assert step is not None
        position = step.rows[0].position + 1
        drawn = [SampledToken(0, position, token, scores)]
        assert scheduler.step_done(step.number, drawn) == [expected]
