"""The routes that drain nodes and choose models."""

from typing import Any

import httpx
import pytest

from .fakes import PEERS, TOKEN, LiveServer

CONTROL = {"X-Pxd-Control": TOKEN}


def post(server: LiveServer, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/cluster/{path}", json=body, headers=CONTROL)


def test_drain_and_resume(server: LiveServer) -> None:
    node = {"id": PEERS["ben"], "name": "ben"}
    answer = post(server, "drain", {"node": "ben"})
    assert answer.headers["cache-control"] == "no-store"
    assert answer.json() == {"node": node, "drained": True, "changed": True}
    assert server.daemon.drains.drained
    assert post(server, "drain", {"node": "ben"}).json()["changed"] is False
    assert post(server, "resume", {"node": "ben"}).json()["drained"] is False
    assert not server.daemon.drains.drained


def test_models(server: LiveServer) -> None:
    answer = post(server, "models/use", {"model": "other"}).json()
    assert answer == {
        "model": "other",
        "names": ["demo", "other"],
        "outgoing": [],
        "changed": True,
    }
    only = post(server, "models/use", {"model": "third", "only": True}).json()
    assert (only["names"], only["outgoing"]) == (["third"], ["demo", "other"])
    assert post(server, "models/stop", {"model": "third"}).json()["names"] == []


def test_files(server: LiveServer) -> None:
    added = post(server, "models/add", {"model": "other"}).json()
    assert added == {"name": "other", "state": "fetching", "progress": 0.0, "reason": ""}
    post(server, "models/add", {"model": "other", "quantize": 8})
    assert server.daemon.added.names == ["other", "other-8bit"]
    removed = post(server, "models/remove", {"model": "other"}).json()
    assert removed == {"model": "other", "deleted": True, "left": "/hub/cache"}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("drain", {"node": "nobody"}, 404, "unknown_node"),
        ("resume", {"node": "nobody"}, 404, "unknown_node"),
        ("drain", {"node": ""}, 400, "bad_request"),
        ("drain", {"node": "ben", "force": True}, 400, "bad_request"),
        ("models/use", {"model": "nonsense"}, 400, "bad_model"),
        ("models/use", {"model": ""}, 400, "bad_request"),
        ("models/use", {"model": "x" * 513}, 400, "bad_request"),
        ("models/use", {}, 400, "bad_request"),
        ("models/add", {"model": "other", "quantize": 7}, 400, "bad_request"),
        ("models/stop", {"model": "unheard-of"}, 404, "unknown_model"),
        ("models/add", {"model": "nonsense"}, 400, "bad_model"),
        ("models/add", {"model": "x" * 513}, 400, "bad_request"),
        ("models/remove", {"model": "needed"}, 409, "in_use"),
    ],
)
def test_what_cannot_be_done(
    server: LiveServer, path: str, body: Any, status: int, code: str
) -> None:
    response = post(server, path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_a_node_that_does_not_answer(server: LiveServer) -> None:
    server.daemon.drains.unreachable = True
    assert post(server, "drain", {"node": "ben"}).status_code == 503
