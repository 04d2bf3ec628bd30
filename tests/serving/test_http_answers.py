"""What a client is told of its answer: characters, stop strings, log probabilities, parameters."""

from itertools import accumulate
from typing import Any

import msgspec
import pytest

from .http_harness import BOTH, demo, encode, serving


@BOTH
async def test_characters_of_several_tokens_come_whole(stream: bool) -> None:
    text = "a🙂b👩‍👩‍👧é 東京🙂"
    assert len(encode("🙂")) == 4, "the demo's tokenizer has a token for each of its bytes"
    async with serving(text) as client:
        answer = await client.answer(stream=stream)
    assert (answer.text, answer.finish) == (text, "stop")
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in answer.pieces)
    if stream:
        assert "🙂" in answer.pieces


@BOTH
async def test_a_character_cut_off_by_max_tokens_shows_as_one_that_could_not_be_read(
    stream: bool,
) -> None:
    """Which is what decoding these tokens gives."""
    async with serving("ab🙂") as client:
        answer = await client.answer(stream=stream, max_tokens=len(encode("ab")) + 2)
    assert (answer.text, answer.finish) == ("ab\N{REPLACEMENT CHARACTER}", "length")


@BOTH
@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("one two THE_END three", "THE_END", "one two "),
        ("one two THE_EMU three", "THE_END", "one two THE_EMU three"),
        ("one 🙂🙃 two", "🙂🙃", "one "),
        ("one 🙂🙂 two", "🙂🙃", "one 🙂🙂 two"),
        ("one two", "wo", "one t"),
        ("one two TH", "THE_END", "one two TH"),
    ],
)
async def test_nothing_of_a_stop_string_is_sent(
    text: str, stop: str, seen: str, stream: bool
) -> None:
    assert len(encode(stop)) > 1 or text == "one two"
    async with serving(text) as client:
        answer = await client.answer(stream=stream, stop=[stop, "never"], logprobs=True)
    assert (answer.text, answer.finish) == (seen, "stop")
    assert answer.logprobs is not None
    told = b"".join(bytes(entry["bytes"]) for entry in answer.logprobs["content"])
    # Of the token in which the stop string begins, the beginning was sent.
    assert told.startswith(seen.encode())
    assert len(told) == len(seen.encode()) or text == "one two"


@BOTH
@pytest.mark.parametrize(
    ("stops", "seen"),
    [
        # Where one begins with another, the shorter is met first.
        (["THE_END", "THE"], "one two "),
        (["THE", "THE_END"], "one two "),
        # Of those that overlap, the one that begins first counts, though it ends last.
        (["two THE_END", "HE"], "one "),
        (["wo", "two T", "two X"], "one "),
        (["E_ENX", "D three", "never"], "one two THE_EN"),
        (["x", "y", "z", "THE_END three"], "one two "),
    ],
)
async def test_of_several_stop_strings_the_first_to_begin_counts(
    stops: list[str], seen: str, stream: bool
) -> None:
    async with serving("one two THE_END three") as client:
        answer = await client.answer(stream=stream, stop=stops)
    assert (answer.text, answer.finish) == (seen, "stop")


async def test_text_that_cannot_become_a_stop_string_is_sent_at_once() -> None:
    """And what might is held back until it is certain, and then sent once."""
    async with serving("abTHE_EMU") as client:
        answer = await client.answer(stream=True, stop="THE_END")
    pieces = [piece for piece in answer.pieces if piece]
    assert len(pieces) > 2
    assert not any("THE_END".startswith(piece) for piece in pieces)
    assert "".join(pieces) == "abTHE_EMU"


async def test_a_stop_string_ends_the_answer_also_before_min_tokens() -> None:
    """Which bars tokens only: text that one is told to end with can come of any of them."""
    async with serving("one two three") as client:
        answer = await client.answer(stream=False, stop="two", min_tokens=100)
    assert (answer.text, answer.finish) == ("one ", "stop")
    assert client.script.openings[0].sampling.min_length > 100
    assert client.script.openings[0].sampling.barred == demo().eos


@BOTH
async def test_logprobs_have_a_token_each(stream: bool) -> None:
    async with serving("b🙂") as client:
        answer = await client.answer(stream=stream, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    content = answer.logprobs["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "b🙂".encode()
    assert content[0] == {
        "token": "b",
        "logprob": 0.0,
        "bytes": [98],
        "top_logprobs": [
            {"token": "b", "logprob": 0.0, "bytes": [98]},
            {"token": "<|end|>", "logprob": -9.0, "bytes": list(b"<|end|>")},
        ],
    }
    assert [entry["logprob"] for entry in content] == [-place / 8 for place in range(5)]
    assert content[1]["token"] == "\N{REPLACEMENT CHARACTER}"


@BOTH
async def test_without_logprobs_there_are_none(stream: bool) -> None:
    """Though this model gives some unasked."""
    async with serving("abc") as client:
        assert (await client.answer(stream=stream)).logprobs is None


async def test_stop_tokens_end_the_answer() -> None:
    async with serving("one two x") as client:
        answer = await client.answer(stream=False, stop_token_ids=[encode("x")[0]])
    assert (answer.text, answer.finish) == ("one two ", "stop")


@BOTH
async def test_an_answer_that_goes_on_elsewhere_says_what_it_has_already(stream: bool) -> None:
    """And neither text nor log probabilities come twice or get lost."""
    text = "aab🙂🙂"
    async with serving(text, dies_at=6) as client:
        answer = await client.answer(stream=stream, logprobs=True, repetition_penalty=1.5)
    assert (answer.text, answer.finish) == (text, "stop")
    assert answer.logprobs is not None
    assert bytes(b for e in answer.logprobs["content"] for b in e["bytes"]) == text.encode()
    first, again = client.script.openings
    assert first.history is not None
    assert again.history is not None
    assert (first.history.answer, again.history.prompt) == ((), first.history.prompt)
    assert list(accumulate(again.history.answer)) == sorted(encode(text)[:6])


async def test_every_parameter_reaches_the_last_stage() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "seed": 3,
    }
    async with serving("abc") as client:
        response = await client.ask(
            **fields,
            logit_bias={"5": -100},
            logprobs=True,
            top_logprobs=2,
            min_tokens=2,
            stop_token_ids=[7],
        )
    [opening] = client.script.openings
    prompt = response.json()["usage"]["prompt_tokens"]
    assert msgspec.structs.asdict(opening.sampling) == {
        **fields,
        "logit_bias": ((5, -100.0),),
        "logprobs": 2,
        "min_length": prompt + 2,
        "barred": (*demo().eos, 7),
    }
    assert opening.history is not None
    assert opening.history.answer == ()
    assert opening.history.prompt


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logit_bias": {"5": 1, "752": 1}}, "logit_bias", "752"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "999999999"),
        ({"stop_token_ids": [7, 752]}, "stop_token_ids", "752"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens"),
    ],
)
async def test_what_cannot_be_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    async with serving("abc") as client:
        response = await client.ask(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert client.script.openings == []


@pytest.mark.parametrize("name", ["chat_template", "add_generation_prompt"])
async def test_the_template_itself_is_not_for_a_client_to_choose(name: str) -> None:
    async with serving("one") as client:
        response = await client.ask(chat_template_kwargs={name: "{{ 1 }}"})
        fine = await client.ask(chat_template_kwargs={"enable_thinking": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "chat_template_kwargs"
    assert name in response.json()["error"]["message"]
    assert fine.status_code == 200
