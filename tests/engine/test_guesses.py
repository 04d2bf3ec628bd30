"""Guessed tokens in the scheduler: what is sent, what is taken, and what is sent again."""

from collections.abc import Sequence

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Admission, Continuous, ContinuousConfig
from pxd.engine.scheduler import Generated, PlannedStep, Scheduler
from pxd.wire import Logprobs, SampledToken, Sampling

from .pipeline import EOS, Pipeline, answer, next_token, request

PROMPT = [1, 2, 3]


class Fixed:
    """Guesses the right tokens, except for those at the positions `wrong`."""

    def __init__(self, wrong: Sequence[int] = ()) -> None:
        self.wrong = wrong
        self.learnt: list[tuple[int, int]] = []

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        right = answer(list(tokens), most)
        return [0 if len(tokens) + i in self.wrong else t for i, t in enumerate(right)]

    def learn(self, guessed: int, right: int) -> None:
        self.learnt.append((guessed, right))


class Run:
    """A scheduler and its pipeline, one step at a time."""

    def __init__(
        self,
        wrong: Sequence[int] = (),
        *,
        guesses: int = 4,
        blocks: int = 8,
        in_flight: int = 1,
        step_tokens: int = 4096,
        admission: Admission = "reserve",
    ) -> None:
        self.guesser = Fixed(wrong)
        config = ContinuousConfig(
            kv_tokens=blocks * BLOCK_TOKENS,
            max_in_flight=in_flight,
            step_tokens=step_tokens,
            admission=admission,
        )
        self.policy = Continuous(config, lambda: self.guesser)
        self.policy.guesses = guesses
        self.scheduler = Scheduler(self.policy)
        self.pipeline = Pipeline()

    def send(self) -> tuple[PlannedStep, list[SampledToken]]:
        step = self.scheduler.next_step()
        assert step is not None
        return step, self.pipeline.run(step)

    def step(self) -> tuple[PlannedStep, list[Generated]]:
        step, drawn = self.send()
        return step, self.scheduler.step_done(step.number, drawn)

    def prefill(self) -> None:
        step, _ = self.step()
        assert all(row.draws == 0 for row in step.rows)


def test_right_guesses_are_taken_with_one_token_more() -> None:
    run = Run()
    run.scheduler.add(request(0, PROMPT, 20))
    run.prefill()
    step, (result,) = run.step()
    assert [(row.position, row.count, row.draws) for row in step.rows] == [(2, 5, 5)]
    assert list(result.tokens) == answer(PROMPT, 5)
    step, _ = run.step()
    assert step.rows[0].position == 7
    assert run.guesser.learnt == [(4, 4), (4, 4)]


def test_behind_the_first_wrong_guess_all_is_sent_again() -> None:
    run = Run(wrong=[5])
    run.scheduler.add(request(0, PROMPT, 20))
    run.prefill()
    _, (result,) = run.step()
    assert list(result.tokens) == answer(PROMPT, 3)
    step, (result,) = run.step()
    assert step.rows[0].position == 5
    assert step.tokens[0] == answer(PROMPT, 3)[-1]
    assert list(result.tokens) == answer(PROMPT, 8)[3:]
    assert run.guesser.learnt == [(4, 2), (4, 4)]


def test_nothing_is_guessed_beyond_the_last_token_nor_behind_the_end() -> None:
    run = Run(guesses=16)
    run.scheduler.add(request(0, PROMPT, 4))
    run.prefill()
    step, (result,) = run.step()
    assert step.rows[0].draws == 4
    assert (list(result.tokens), result.finish) == (answer(PROMPT, 4), "length")

    run = Run(guesses=16)
    end = answer(PROMPT, 3)[2]
    run.scheduler.add(request(0, PROMPT, 9, eos=frozenset({end})))
    run.prefill()
    step, (result,) = run.step()
    assert step.rows[0].draws == 3
    assert (list(result.tokens), result.finish) == (answer(PROMPT, 2), "stop")
    assert run.policy.pool.used == 0


def test_an_end_among_guesses_ends_the_request() -> None:
    run = Run()
    run.pipeline.ends[0] = len(PROMPT) + 2
    run.scheduler.add(request(0, PROMPT, 20, eos=frozenset({EOS})))
    run.prefill()
    _, (result,) = run.step()
    assert (list(result.tokens), result.finish) == (answer(PROMPT, 2), "stop")
    assert run.scheduler.requests == []


def test_each_token_that_is_taken_has_its_log_probabilities() -> None:
    run = Run(wrong=[4])
    run.scheduler.add(request(0, PROMPT, 20))
    run.prefill()
    step, drawn = run.send()
    scored = [SampledToken(d.request, d.position, d.token, Logprobs(-d.position)) for d in drawn]
    (result,) = run.scheduler.step_done(step.number, scored)
    assert [scores.token for scores in result.logprobs] == [-3, -4]
    assert len(result.tokens) == 2


def test_with_penalties_nothing_is_guessed() -> None:
    run = Run()
    run.scheduler.add(
        request(0, PROMPT, 20, sampling=Sampling(temperature=0, presence_penalty=0.5))
    )
    run.prefill()
    step, _ = run.step()
    assert step.rows[0].draws == 1


def test_only_who_has_a_step_to_itself_guesses() -> None:
    run = Run(in_flight=2)
    for number in range(3):
        run.scheduler.add(request(number, [number, 2, 3], 20))
    run.prefill()
    for _ in range(4):
        step, _ = run.step()
        assert [row.draws for row in step.rows] == [1, 1]
    run.scheduler.cancel(0)
    step, _ = run.step()
    assert [row.draws for row in step.rows] == [5]


def test_guesses_stay_within_the_step_and_the_blocks_at_hand() -> None:
    run = Run(guesses=16, step_tokens=4)
    run.scheduler.add(request(0, PROMPT, 60))
    run.prefill()
    step, _ = run.step()
    assert len(step.tokens) == 4

    prompt = list(range(BLOCK_TOKENS - 3))
    run = Run(guesses=16, admission="preempt")
    run.scheduler.add(request(0, prompt, 60))
    run.prefill()
    step, _ = run.step()
    assert (step.rows[0].position, step.rows[0].count) == (BLOCK_TOKENS - 4, 4)
    step, _ = run.step()
    assert (step.rows[0].position, step.rows[0].count) == (BLOCK_TOKENS, 17)


def test_blocks_are_found_again_only_as_far_as_guesses_came_true() -> None:
    """The guesses fill a block, but one of them is wrong."""
    prompt = list(range(BLOCK_TOKENS - 2))
    known = [*prompt, *answer(prompt, 2), 5]
    run = Run(wrong=[BLOCK_TOKENS - 1])
    run.scheduler.add(request(0, prompt, 20))
    run.prefill()
    run.step()
    assert run.policy.pool.cached == 0
    run.scheduler.add(request(1, known, 5))
    step, _ = run.step()
    assert [opening.cached for opening in step.openings] == [0]
    run.scheduler.cancel(1)
    run.step()
    assert run.policy.pool.cached == 1
    run.scheduler.add(request(2, known, 5))
    step, _ = run.step()
    assert [opening.cached for opening in step.openings] == [BLOCK_TOKENS]


def test_tokens_that_are_not_due_are_ignored() -> None:
    """The last stage may err; what it sent in order still counts."""
    run = Run()
    run.scheduler.add(request(0, PROMPT, 20))
    run.prefill()
    step, drawn = run.send()
    strange = [SampledToken(0, 99, 5), SampledToken(9, 3, 5), *drawn[:2], *drawn[:2], drawn[3]]
    (result,) = run.scheduler.step_done(step.number, strange)
    assert list(result.tokens) == answer(PROMPT, 2)
    step, (result,) = run.step()
    assert result.tokens[0] == next_token([*PROMPT, *answer(PROMPT, 2)])
