"""Checks a step against what an engine holds, before anything of it is run."""

from collections.abc import Iterable, Mapping

import numpy as np

from pxd.engine.sampling import Sampler
from pxd.executors.protocol import StepRejected
from pxd.wire import MAX_DRAWS, Buffer, Limits, Row, Step

FRAME_BYTES = Limits().body


def check_rows(
    step: Step, lengths: Mapping[int, int], guessed: Mapping[int, int]
) -> dict[int, int]:
    """Return the lengths after the step; raises `StepRejected` unless every row goes on where its
    request is.

    `lengths` are the positions that each open request has, those released by the step excluded. The
    last `guessed` of them, 0 where not named, may be taken back. A request may have several rows,
    one behind the other, of which only the last may draw.
    """
    _check_openings(step, lengths)
    expected = {**lengths, **{opening.request: opening.cached for opening in step.openings}}
    unknown = tuple({row.request for row in step.rows} - expected.keys())
    if unknown:
        raise StepRejected("unknown-request", f"requests {unknown} are not open", unknown)
    seen: set[int] = set()
    drawn: set[int] = set()
    for row in step.rows:
        place = expected[row.request]
        least = place if row.request in seen else place - guessed.get(row.request, 0)
        if row.request in drawn or not least <= row.position <= place:
            raise StepRejected(
                "bad-step",
                f"request {row.request} has {place} positions, the step goes on at {row.position}",
                (row.request,),
            )
        if row.draws > row.count:
            raise StepRejected(
                "bad-step",
                f"{row.draws} draws from {row.count} positions of request {row.request}",
                (row.request,),
            )
        expected[row.request] = row.position + row.count
        seen.add(row.request)
        if row.draws:
            drawn.add(row.request)
    draws = sum(row.draws for row in step.rows)
    if draws > MAX_DRAWS:
        raise StepRejected("bad-step", f"{draws} draws in one step", requests_of(step.rows))
    return expected


def _check_openings(step: Step, lengths: Mapping[int, int]) -> None:
    opened = [opening.request for opening in step.openings]
    again = tuple({number for number in opened if number in lengths or opened.count(number) > 1})
    if again:
        raise StepRejected("bad-step", f"requests {again} are opened twice", again)


def check_copies(step: Step, *, has_tier: bool) -> None:
    """Raises `StepRejected` for copies that this stage cannot even begin."""
    for copy in filter(None, (step.store, step.load)):
        if not has_tier:
            raise StepRejected("bad-step", "this stage has no second KV tier")
        if len(copy.blocks) != len(copy.slots):
            raise StepRejected("bad-step", f"{len(copy.blocks)} blocks for {len(copy.slots)} slots")


def check_guesses(step: Step, samplers: Mapping[int, Sampler | None], *, trims: bool) -> None:
    """Raises `StepRejected` for rows whose guesses could not be taken back, or whose draws depend
    on them. `samplers` are those of open requests, on a last stage; `trims` says that positions can
    be taken back."""
    rows = [row for row in step.rows if row.draws > 1]
    if rows and not trims:
        raise StepRejected(
            "bad-step", "this model's caches cannot take guesses back", requests_of(tuple(rows))
        )
    histories = {opening.request for opening in step.openings if opening.history is not None}
    for row in rows:
        sampler = samplers.get(row.request)
        if row.request in histories or (sampler is not None and sampler.counts is not None):
            raise StepRejected(
                "bad-step", "penalties depend on what was only guessed", (row.request,)
            )


def check_capacity(step: Step, lengths: Mapping[int, int], kv_tokens: int) -> None:
    """Raises `StepRejected` if the `lengths` after the step need more than `kv_tokens` positions
    in all."""
    total = sum(lengths.values())
    if total > kv_tokens:
        raise StepRejected(
            "bad-step",
            f"the step needs {total} positions of KV cache, this stage has {kv_tokens}",
            requests_of(step.rows),
        )


def check_tokens(step: Step, body: Buffer, vocabulary: int) -> None:
    """Check the input of a first stage; a token id out of range would read foreign memory."""
    count = sum(row.count for row in step.rows)
    if step.tensor.dtype != "i32" or step.tensor.shape != (count,):
        raise StepRejected(
            "bad-step", f"expected {count} token ids, got {step.tensor}", requests_of(step.rows)
        )
    tokens = np.frombuffer(body, "<i4")
    place = 0
    for row in step.rows:
        chunk = tokens[place : place + row.count]
        place += row.count
        if chunk.min() < 0 or chunk.max() >= vocabulary:
            raise StepRejected(
                "bad-step",
                f"request {row.request} has token ids beyond the vocabulary of {vocabulary}",
                (row.request,),
            )


def check_output(step: Step, hidden_bytes: int) -> None:
    """Check that hidden states of so many bytes for each position fit into one frame."""
    size = sum(row.count for row in step.rows) * hidden_bytes
    if size > FRAME_BYTES:
        # What helps is what helps where memory is short: a smaller step.
        raise StepRejected(
            "out-of-memory",
            f"{size >> 20} MiB of hidden states are more than the {FRAME_BYTES >> 20} MiB that go "
            "into one frame",
            requests_of(step.rows),
        )


def check_hidden(step: Step, body: Buffer, hidden_size: int) -> None:
    """Check the input of a stage that is not the first. `body` is as long as the step says."""
    count = sum(row.count for row in step.rows)
    if step.tensor.dtype == "i32" or step.tensor.shape != (count, hidden_size):
        raise StepRejected(
            "bad-step",
            f"expected hidden states of shape ({count}, {hidden_size}), got {step.tensor}",
            requests_of(step.rows),
        )
    if step.tensor.coding is not None:
        scales = np.frombuffer(body, "<f4", count)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise StepRejected(
                "bad-step",
                "hidden states with scales that are negative or not finite",
                requests_of(step.rows),
            )


def draws_of(rows: Iterable[Row]) -> list[tuple[int, int]]:
    """Request and position of each token that is drawn, in the order of a `Sampled`."""
    return [
        (row.request, row.position + row.count - behind)
        for row in rows
        for behind in reversed(range(row.draws))
    ]


def requests_of(rows: tuple[Row, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(row.request for row in rows))
