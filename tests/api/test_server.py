"""The HTTP server under clients that leave, stall, overload or outstay it. Real sockets."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import httpx
import pytest
import trio
import trio.testing

import pxd.api.connection
import pxd.api.drain
import pxd.api.server
from pxd.api.app import create_app
from pxd.api.body import MAX_BODY
from pxd.api.server import BindError, serve
from pxd.serving.requests import Delta

from .fakes import DEADLINE_S, FakeAnswer, FakeDaemon, LiveServer, live_server

JSON = {"content-type": "application/json"}


def request_bytes(stream: bool, path: str = "/v1/chat/completions") -> bytes:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "stream": stream})
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()


def connect(server: LiveServer) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=DEADLINE_S)


def read_until(connection: socket.socket, needle: bytes) -> bytes:
    data = b""
    while needle not in data:
        piece = connection.recv(65536)
        assert piece, f"the server closed before {needle!r}; it sent {data!r}"
        data += piece
    return data


def read_to_end(connection: socket.socket) -> bytes:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    return data


def send_forever(connection: socket.socket, data: bytes) -> NoReturn:
    while True:
        connection.sendall(data)


def answer_of(server: LiveServer) -> FakeAnswer:
    """The first answer, once it exists and waits."""
    deadline = time.monotonic() + DEADLINE_S
    while not server.daemon.ingress.answers:
        assert time.monotonic() < deadline, "no request arrived"
        threading.Event().wait(0.01)
    answer = server.daemon.ingress.answers[0]
    assert answer.waiting.wait(DEADLINE_S)
    return answer


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_answer(server: LiveServer, stream: bool) -> None:
    server.daemon.ingress.scripts.append([Delta("a", 1), trio.Event()])
    with connect(server) as connection:
        connection.sendall(request_bytes(stream))
        if stream:
            read_until(connection, b'"content":"a"')
        answer = answer_of(server)
        assert not answer.left.is_set()
    assert answer.cancelled
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_a_client_that_leaves_before_the_first_piece(server: LiveServer) -> None:
    server.daemon.ingress.scripts.append([trio.Event()])
    with connect(server) as connection:
        connection.sendall(request_bytes(True))
        answer = answer_of(server)
    assert answer.cancelled


def test_a_client_that_leaves_amid_its_request(server: LiveServer) -> None:
    with connect(server) as connection:
        connection.sendall(request_bytes(False)[:-5])
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert server.daemon.ingress.calls == []


def test_a_client_that_reads_nothing_is_dropped(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pxd.api.connection, "SEND_TIMEOUT_S", 0.3)
    server.daemon.ingress.scripts.append([Delta("x" * 1_000_000, 1)] * 40)
    with connect(server) as connection:
        connection.sendall(request_bytes(True))
        deadline = time.monotonic() + DEADLINE_S
        while not server.daemon.ingress.answers:
            assert time.monotonic() < deadline
            threading.Event().wait(0.01)
        assert server.daemon.ingress.answers[0].cancelled


def test_a_connection_serves_many_requests(server: LiveServer) -> None:
    with connect(server) as connection:
        for _ in range(3):
            connection.sendall(request_bytes(False))
            assert b"200" in read_until(connection, b'"total_tokens"').splitlines()[0]
            connection.sendall(request_bytes(True))
            assert b"200" in read_until(connection, b"[DONE]\n\n\r\n0\r\n\r\n").splitlines()[0]


@pytest.mark.parametrize("stream", [False, True])
def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(pxd.api.server, "IDLE_TIMEOUT_S", 1.0)
    with live_server() as server, connect(server) as connection, connect(server) as silent:
        connection.sendall(request_bytes(stream))
        assert b"200 " in read_to_end(connection)
        assert read_to_end(silent) == b""


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing", "/healthz"])
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(server: LiveServer, path: str, declared: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range((MAX_BODY >> 16) + 10):
            yield b" " * (1 << 16)

    body = b"".join(pieces()) if declared else pieces()
    response = httpx.post(server.url + path, content=body, headers=JSON, timeout=DEADLINE_S)
    status, code = {
        "/v1/chat/completions": (413, "request_too_large"),
        "/v1/nothing": (404, "unknown_url"),
        "/healthz": (405, "method_not_allowed"),
    }[path]
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert server.daemon.ingress.calls == []


def test_the_largest_body_is_taken(server: LiveServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=body + b" " * (MAX_BODY - len(body)),
        headers=JSON,
        timeout=DEADLINE_S,
    )
    assert response.status_code == 200


async def test_an_app_that_does_not_read_does_not_hang_the_connection(
    nursery: trio.Nursery,
) -> None:
    size = 8 << 20
    go = trio.Event()

    async def app(scope, receive, send) -> None:
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"enough"})

    url = await nursery.start(serve, app, "127.0.0.1", 0)
    stream = await trio.open_tcp_stream("127.0.0.1", int(url.rpartition(":")[2]))
    head = f"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {size}\r\n\r\n"
    with trio.fail_after(DEADLINE_S):
        async with stream:
            async with trio.open_nursery() as sending:
                sending.start_soon(stream.send_all, head.encode() + bytes(size))
                # The server's queues are full by then: its backpressure has reached the client.
                await trio.testing.wait_all_tasks_blocked(0.1)
                go.set()
            assert b"enough" in b"".join([piece async for piece in stream])
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("chunk", [b"10000\r\n" + b"x" * 65536 + b"\r\n", b"1\r\nx\r\n" * 10_000])
def test_a_request_that_sends_forever_is_ended(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, chunk: bytes
) -> None:
    monkeypatch.setattr(pxd.api.drain, "LINGER_S", 0.3)
    with connect(server) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_forever(connection, chunk)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\xff\x00\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: -1\r\nHost: a\r\n\r\n",
        b"GET /" + b"a" * 70_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        b"GET http://evil/%ff%00 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ],
)
def test_garbage_costs_only_its_own_connection(
    server: LiveServer, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(server) as connection:
        connection.sendall(garbage)
        assert connection.recv(65536).startswith(b"HTTP/1.1 4")
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert "bug" not in caplog.text


def test_surplus_connections_are_refused(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pxd.api.server, "MAX_CONNECTIONS", 2)
    with connect(server) as first, connect(server) as second:
        for connection in (first, second):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            read_until(connection, b"ok")
        monkeypatch.setattr(pxd.api.server, "MAX_TURNED_AWAY", 1)
        monkeypatch.setattr(pxd.api.server, "TURN_AWAY_S", DEADLINE_S)
        with connect(server) as third:
            read_until(third, b"429")
            with connect(server) as fourth:
                assert fourth.recv(1) == b"", "while one is being told, others are not"
        monkeypatch.setattr(pxd.api.server, "MAX_TURNED_AWAY", 64)
        response = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": []})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "5"
        assert response.json()["error"]["code"] == "overloaded"


def test_a_client_that_hangs_up_takes_up_no_connection(server: LiveServer) -> None:
    assert DEADLINE_S < pxd.api.server.IDLE_TIMEOUT_S
    with connect(server) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""


def test_shutdown_lets_a_running_answer_end() -> None:
    gate = trio.Event()
    with live_server(grace=DEADLINE_S) as server, connect(server) as connection:
        server.daemon.ingress.scripts.append([Delta("a", 1), gate, Delta("b", 1, "stop")])
        with connect(server) as idle:
            connection.sendall(request_bytes(True))
            read_until(connection, b'"content":"a"')
            server.set(server.daemon.shutdown)
            assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        server.set(gate)
        assert b"[DONE]" in read_to_end(connection)
        server.join()


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_ends_requests_with_an_error(server: LiveServer, stream: bool) -> None:
    clients = server.daemon.clients
    gate = trio.Event()
    server.daemon.ingress.scripts.append([Delta("a", 1), gate, Delta("b", 1, "stop")])
    with connect(server) as connection, connect(server) as late:
        connection.sendall(request_bytes(stream))
        answer = answer_of(server)
        assert clients.count == 1
        server.call(clients.refuse)
        late.sendall(request_bytes(stream))
        refused = read_until(late, b"leaving the cluster")
        assert refused.startswith(b"HTTP/1.1 503")
        assert b"retry-after: 5" in refused
        server.call(clients.end)
        ended = read_until(connection, b"leaving the cluster")
        assert ended.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
        assert b"[DONE]" not in ended
        assert answer.cancelled
        assert clients.count == 0


def test_shutdown_cuts_what_takes_too_long() -> None:
    with live_server(grace=0.2) as server, connect(server) as connection:
        server.daemon.ingress.scripts.append([Delta("a", 1), trio.Event()])
        connection.sendall(request_bytes(True))
        read_until(connection, b'"content":"a"')
        server.set(server.daemon.shutdown)
        server.join()
        assert server.daemon.ingress.answers[0].cancelled
        assert b"[DONE]" not in read_to_end(connection)


def test_shutdown_does_not_wait_for_a_client_that_reads_nothing() -> None:
    with live_server(grace=0.2) as server, connect(server) as connection:
        server.daemon.ingress.scripts.append([Delta("x" * 1_000_000, 1)] * 40)
        connection.sendall(request_bytes(True))
        connection.recv(1)
        server.set(server.daemon.shutdown)
        server.join()


async def test_a_taken_port_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BindError, match=f"cannot listen on 127.0.0.1:{port}.*--http"):
            await serve(create_app(FakeDaemon()), "127.0.0.1", port)


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
async def test_a_foreign_address_is_a_clear_error(host: str) -> None:
    with trio.fail_after(DEADLINE_S), pytest.raises(BindError, match="cannot listen on"):
        await serve(create_app(FakeDaemon()), host, 0)


@pytest.mark.parametrize(
    ("host", "url"),
    [("127.0.0.1", "http://127.0.0.1:"), ("0.0.0.0", "http://127.0.0.1:"), ("localhost", "http")],
)
async def test_the_url_can_be_called(nursery: trio.Nursery, host: str, url: str) -> None:
    bound = await nursery.start(serve, create_app(FakeDaemon()), host, 0)
    assert bound.startswith(url)
    async with httpx.AsyncClient() as client:
        assert (await client.get(f"{bound}/healthz")).status_code == 200
    nursery.cancel_scope.cancel()
