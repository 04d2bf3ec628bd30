"""The routes that replace the key and ban nodes."""

from typing import Any

import httpx
import pytest

from .fakes import PEERS, TOKEN, LiveServer

CONTROL = {"X-Pxd-Control": TOKEN}


def post(server: LiveServer, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/cluster/{path}", json=body, headers=CONTROL)


def test_rotation(server: LiveServer) -> None:
    response = post(server, "key/rotate", {"grace": 3600})
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    assert response.json() == {
        "generation": 1,
        "grace": 3600.0,
        "told": {
            "confirmed": [{"id": PEERS["ben"], "name": "ben"}],
            "unconfirmed": [{"id": PEERS["carl"], "name": "carl"}],
        },
        "superseded": False,
    }
    assert server.daemon.door.grace == 3600


def test_kick_list_and_pardon(server: LiveServer) -> None:
    answer = post(server, "kick", {"node": "ben"}).json()
    assert (answer["node"], answer["banned"]) == ({"id": PEERS["ben"], "name": "ben"}, True)
    assert answer["rotation"] is None
    listed = httpx.get(f"{server.url}/cluster/bans", headers=CONTROL).json()
    assert listed == {"bans": [{"id": PEERS["ben"], "name": "ben", "by": PEERS["anna"]}]}
    assert post(server, "kick", {"node": "ben", "rotate": True}).json()["rotation"]["grace"] == 0
    assert post(server, "pardon", {"node": "ben"}).json()["banned"] is False
    assert httpx.get(f"{server.url}/cluster/bans", headers=CONTROL).json() == {"bans": []}


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("kick", {"node": "nobody"}, 404, "unknown_node"),
        ("pardon", {"node": "nobody"}, 404, "unknown_node"),
        ("kick", {"node": "anna"}, 409, "own_node"),
        ("kick", {"node": ""}, 400, "bad_request"),
        ("kick", {"node": "x" * 129}, 400, "bad_request"),
        ("kick", {"node": "ben", "grace": 1}, 400, "bad_request"),
        ("kick", {}, 400, "bad_request"),
        ("key/rotate", {}, 400, "bad_request"),
        ("key/rotate", {"grace": -1}, 400, "bad_request"),
        ("key/rotate", {"grace": 1e12}, 400, "bad_grace"),
        ("key/rotate", [], 400, "bad_request"),
    ],
)
def test_what_cannot_be_done(
    server: LiveServer, path: str, body: Any, status: int, code: str
) -> None:
    response = post(server, path, body)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert (server.daemon.door.grace, server.daemon.door.bans) == (None, [])
