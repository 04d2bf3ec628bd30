"""POST /v1/chat/completions as the real openai client sees it."""

import httpx
import openai
import pytest

from pxd.serving.requests import (
    DeadlineExceeded,
    Delta,
    Generation,
    GenerationFailed,
    Message,
    NotReady,
    Overloaded,
)

from .fakes import LiveServer

HELLO = [{"role": "user", "content": "hello there you"}]


def test_a_whole_answer(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="demo", messages=HELLO)
    assert completion.id == "chatcmpl-fake0"
    assert completion.object == "chat.completion"
    assert completion.model == "demo"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == "hello there you"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage is not None
    assert completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
    }


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="demo", messages=HELLO, stream=True))
    assert {chunk.id for chunk in chunks} == {"chatcmpl-fake0"}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in chunks] == [
        *("", "hello", " there", " you"),
        None,
    ]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [*[None] * 4, "stop"]
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_when_asked_for(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (3, 4)


def test_the_length_limit_is_a_finish_reason(server: LiveServer, client: openai.OpenAI) -> None:
    server.daemon.ingress.scripts.append([Delta("a", 1), Delta("b", 1, "length")])
    completion = client.chat.completions.create(model="demo", messages=HELLO)
    assert completion.choices[0].finish_reason == "length"
    assert completion.choices[0].message.content == "ab"


THINKING = [
    Delta("", 1),
    Delta("", 1, thought="Two and "),
    Delta("Four", 2, thought="two."),
    Delta(".", 1),
    Delta("", 0, "stop"),
]


def test_thoughts_are_kept_apart(server: LiveServer, client: openai.OpenAI) -> None:
    server.daemon.ingress.scripts.append(list(THINKING))
    completion = client.chat.completions.create(model="demo", messages=HELLO)
    message = completion.choices[0].message
    assert message.content == "Four."
    assert message.reasoning_content == "Two and two."  # type: ignore[attr-defined]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    plain = client.chat.completions.create(model="demo", messages=HELLO)
    assert "reasoning_content" not in plain.choices[0].message.model_dump()


def test_thoughts_are_streamed_before_the_answer(server: LiveServer, client: openai.OpenAI) -> None:
    server.daemon.ingress.scripts.append(list(THINKING))
    chunks = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
    deltas = [chunk.choices[0].delta.model_dump(exclude_none=True) for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "Two and "},
        {"reasoning_content": "two.", "content": "Four"},
        {"content": "."},
        {},
    ]


def test_options_of_the_template_arrive(server: LiveServer, client: openai.OpenAI) -> None:
    options = {"enable_thinking": False, "budget": {"tokens": 3}}
    client.chat.completions.create(
        model="demo", messages=HELLO, extra_body={"chat_template_kwargs": options}
    )
    [(_, _, generation)] = server.daemon.ingress.calls
    assert generation.template_options == options


def test_every_parameter_arrives(server: LiveServer, client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "system", "content": "s"},
            {"role": "developer", "content": "d"},
            {"role": "assistant", "content": "a"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
            },
        ],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=7,
        stop=["x", "yy"],
        seed=3,
        user="somebody",
        n=1,
        logprobs=True,
        top_logprobs=2,
        presence_penalty=0.5,
        frequency_penalty=-0.25,
        logit_bias={"5": -100, "0": 1},
        response_format={"type": "text"},
        extra_body={
            "a_field_of_another_dialect": [1],
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "stop_token_ids": [7, 8],
        },
    )
    assert server.daemon.ingress.calls == [
        (
            "demo",
            (
                Message("system", "s"),
                Message("developer", "d"),
                Message("assistant", "a"),
                Message("user", "one two"),
            ),
            Generation(
                max_tokens=7,
                temperature=0.5,
                top_p=0.9,
                top_k=40,
                min_p=0.05,
                repetition_penalty=1.1,
                presence_penalty=0.5,
                frequency_penalty=-0.25,
                logit_bias=((5, -100.0), (0, 1.0)),
                logprobs=2,
                min_tokens=2,
                stop=("x", "yy"),
                stop_token_ids=(7, 8),
                seed=3,
            ),
        )
    ]


def test_defaults(server: LiveServer) -> None:
    body = {"messages": HELLO, "temperature": None, "stop": None, "stream": None}
    assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
    assert server.daemon.ingress.calls[0][0] is None
    assert server.daemon.ingress.calls[0][2] == Generation()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"stop": "end"}, Generation(stop=("end",))),
        ({"max_tokens": 5}, Generation(max_tokens=5)),
        ({"max_tokens": 5, "max_completion_tokens": 6}, Generation(max_tokens=6)),
        ({"seed": -1}, Generation(seed=(1 << 63) - 1)),
        ({"temperature": 0}, Generation(temperature=0.0)),
        ({"logprobs": True}, Generation(logprobs=0)),
        ({"logprobs": False, "top_logprobs": 0}, Generation()),
        ({"extra_body": {"top_k": -1}}, Generation(top_k=0)),
        ({"extra_body": {"priority": -3}}, Generation(priority=-3)),
        ({"extra_body": {"timeout": 30}}, Generation(timeout=30.0)),
        (
            {"extra_body": {"min_tokens": 5}, "max_tokens": 5},
            Generation(max_tokens=5, min_tokens=5),
        ),
    ],
)
def test_parameter_forms(
    server: LiveServer, client: openai.OpenAI, fields: dict, expected: Generation
) -> None:
    client.chat.completions.create(model="demo", messages=HELLO, **fields)
    assert server.daemon.ingress.calls[0][2] == expected


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=HELLO)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True])
def test_not_ready_says_when_to_come_back(
    server: LiveServer, client: openai.OpenAI, stream: bool
) -> None:
    server.daemon.ingress.refusals.append(NotReady("4.4 GiB are missing", retry_after=9))
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"] == "9"
    assert caught.value.code == "not_ready"
    assert "4.4 GiB are missing" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_piece_is_an_http_error(
    server: LiveServer, client: openai.OpenAI, stream: bool
) -> None:
    server.daemon.ingress.scripts.append([GenerationFailed("no pipeline came back")])
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, stream=stream)
    assert caught.value.status_code == 502
    assert caught.value.code == "generation_failed"
    assert "no pipeline came back" in caught.value.message
    assert server.daemon.ingress.answers[0].left.wait(5)


@pytest.mark.parametrize("stream", [False, True])
def test_too_many_requests(server: LiveServer, client: openai.OpenAI, stream: bool) -> None:
    server.daemon.ingress.refusals.append(Overloaded("8192 are here already", retry_after=9))
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="demo", messages=HELLO, stream=stream)
    assert caught.value.response.headers["retry-after"] == "9"
    assert caught.value.code == "overloaded"
    assert "8192 are here already" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_does_not_try_again_when_the_time_is_over(
    server: LiveServer, stream: bool
) -> None:
    server.daemon.ingress.refusals.append(DeadlineExceeded("not done within 5 s"))
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model="demo", messages=HELLO, stream=stream)
    assert caught.value.status_code == 504
    assert caught.value.code == "deadline_exceeded"
    assert len(server.daemon.ingress.calls) == 1


def test_clients_are_told_apart(server: LiveServer) -> None:
    names = []
    for key, user in [("k1", "u"), ("k2", "u"), ("k1", "v"), ("k1", "u")]:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key) as client:
            client.chat.completions.create(model="demo", messages=HELLO, user=user)
        names.append(server.daemon.ingress.clients[-1])
    assert names[0] == names[3]
    assert len(set(names)) == 3
    assert all(len(name) <= 32 for name in names)


@pytest.mark.parametrize("stream", [False, True])
def test_a_session_is_named_by_a_header_or_else_by_the_user(
    server: LiveServer, client: openai.OpenAI, stream: bool
) -> None:
    for headers, user in [({"X-Session-Id": "s"}, "u"), ({}, "u"), ({}, "")]:
        answer = client.chat.completions.create(
            model="demo", messages=HELLO, user=user, extra_headers=headers, stream=stream
        )
        if stream:
            list(answer)
    assert server.daemon.ingress.sessions[-3:] == ["s", "u", ""]


def test_a_failure_in_mid_stream(server: LiveServer, client: openai.OpenAI) -> None:
    server.daemon.ingress.scripts.append([Delta("so", 1), GenerationFailed("all heads gone")])
    chunks = client.chat.completions.create(model="demo", messages=HELLO, stream=True)
    assert [next(chunks).choices[0].delta.content for _ in range(2)] == ["", "so"]
    with pytest.raises(openai.APIError, match="all heads gone"):
        next(chunks)


def test_an_answer_that_breaks_off_is_a_failure(server: LiveServer, client: openai.OpenAI) -> None:
    server.daemon.ingress.scripts.append([Delta("so", 1)])
    with pytest.raises(openai.InternalServerError, match="broke off"):
        client.chat.completions.create(model="demo", messages=HELLO)


def test_the_client_retries_by_itself_until_the_cluster_is_ready(server: LiveServer) -> None:
    server.daemon.ingress.refusals.append(NotReady("loading", retry_after=1))
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=1) as client:
        completion = client.chat.completions.create(model="demo", messages=HELLO)
    assert completion.choices[0].message.content == "hello there you"
