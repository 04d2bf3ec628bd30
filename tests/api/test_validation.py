"""What POST /v1/chat/completions refuses, and how it says so."""

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.api.chat_request import parse_chat_request
from pxd.serving.requests import Delta, InvalidRequest

from .fakes import LiveServer

USER = {"role": "user", "content": "hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def refused(fields: dict[str, Any]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(json.dumps({"messages": [USER]} | fields).encode())
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"max_completion_tokens": 1 << 31}, "max_completion_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": 5}, "stop"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"5\n": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 400: 1}}, "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"seed": "x"}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"n": 0}, "n"),
        ({"priority": 11}, "priority"),
        ({"priority": -11}, "priority"),
        ({"priority": 0.5}, "priority"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": 86401}, "timeout"),
        ({"timeout": "soon"}, "timeout"),
        ({"chat_template_kwargs": ["enable_thinking"]}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"a{n}": 1 for n in range(33)}}, "chat_template_kwargs"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"model": 5}, "model"),
        ({"model": "m" * 513}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [IMAGE]}]}, "messages[1].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
        ),
    ],
)
def test_values_that_mean_nothing(fields: dict[str, Any], param: str) -> None:
    error = refused(fields)
    assert error.param == param
    assert str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("response_format", {"type": "json_object"}),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("web_search_options", {}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
    ],
)
def test_fields_that_would_change_the_answer(field: str, value: Any) -> None:
    error = refused({field: value})
    assert error.param == field
    assert error.code == "unsupported_parameter"


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": 0},
        {"response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0},
        {"modalities": ["text"], "reasoning_effort": "none", "store": True},
        {"messages": [USER | {"name": "anna"}], "metadata": {"a": "b"}},
    ],
)
def test_fields_that_change_nothing(fields: dict[str, Any]) -> None:
    assert parse_chat_request(json.dumps({"messages": [USER]} | fields).encode()).messages


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": NaN}',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"deep": ' + b"[" * 200_000,
        b'{"tools": ' + b"[" * 200_000,
    ],
)
def test_bytes_that_are_no_request(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat_request(body)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_and_never_crash(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse_chat_request(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = [
    *("temperature", "stop", "seed", "tools", "stream_options", "messages", "n", "logit_bias"),
    *("top_k", "min_tokens", "logprobs", "top_logprobs", "stop_token_ids", "repetition_penalty"),
    *("priority", "timeout", "chat_template_kwargs"),
]


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_json_is_either_understood_or_refused(fields: dict[str, Any]) -> None:
    try:
        call = parse_chat_request(json.dumps({"messages": [USER]} | fields).encode())
    except InvalidRequest:
        return
    assert call.messages
    assert call.generation.temperature is None or 0 <= call.generation.temperature <= 2
    assert call.generation.seed is None or 0 <= call.generation.seed < 1 << 63


def test_the_error_on_the_wire(server: LiveServer) -> None:
    body = {"messages": [USER], "temperature": 3}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {
        "error": {
            "message": "temperature: Expected `float` <= 2.0",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        }
    }
    assert server.daemon.ingress.calls == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
def test_a_page_must_say_that_it_sends_json(server: LiveServer, kind: str | None) -> None:
    """Which makes its browser ask first. Programs, which send no Origin, need not name the type."""
    url, content = f"{server.url}/v1/chat/completions", json.dumps({"messages": [USER]})
    headers = {"content-type": kind} if kind else {}
    response = httpx.post(url, content=content, headers={**headers, "origin": "https://a.page"})
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"
    assert server.daemon.ingress.calls == []
    assert httpx.post(url, content=content, headers=headers).status_code == 200


def test_an_unexpected_exception_is_a_500_without_a_trace(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.daemon.ingress.refusals.append(ZeroDivisionError("secret detail"))
    with caplog.at_level(logging.ERROR, "pxd.api"):
        response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": [USER]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
    assert "secret detail" in caplog.text
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_an_unexpected_exception_in_mid_stream_breaks_the_connection(
    server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.daemon.ingress.scripts.append([Delta("a", 1), ZeroDivisionError("boom")])
    body = {"messages": [USER], "stream": True}
    with caplog.at_level(logging.ERROR, "pxd.api"):
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        server.__exit__()
    assert "boom" in caplog.text
