"""Models, health, readiness, status, and who may control the daemon."""

import httpx
import msgspec
import openai
import pytest
from starlette.requests import Request

from pxd.api.app import create_app
from pxd.api.control import require_control
from pxd.api.errors import ApiError
from pxd.doctor.findings import Report
from pxd.serving.status import ClusterStatus, ModelView

from .fakes import TICKET, TOKEN, FakeDaemon, LiveServer

CONTROL = {"X-Pxd-Control": TOKEN}


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "pxd")
    assert client.models.retrieve("demo") == model


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "/home/anna/my model"])
def test_a_model_name_may_be_a_path(server: LiveServer, client: openai.OpenAI, name: str) -> None:
    view = ModelView(name=name, state="waiting", reason="too big", layers=36, pipelines=[])
    server.daemon.cluster = msgspec.structs.replace(server.daemon.cluster, models=[view])
    assert client.models.retrieve(name).id == name


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing/like-it")
    assert caught.value.code == "model_not_found"


def test_ready(server: LiveServer) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    response = httpx.get(f"{server.url}/readyz")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


@pytest.mark.parametrize(
    ("epoch", "models", "reason"),
    [
        (None, [], "the cluster has no plan yet"),
        ("1.1@a", [], "no model is chosen to be served"),
        (
            "1.1@a",
            [ModelView(name="m", state="waiting", reason="2 GiB missing", layers=1, pipelines=[])],
            "m is waiting: 2 GiB missing",
        ),
    ],
)
def test_not_ready(
    server: LiveServer, epoch: str | None, models: list[ModelView], reason: str
) -> None:
    server.daemon.cluster = msgspec.structs.replace(
        server.daemon.cluster, epoch=epoch, models=models
    )
    response = httpx.get(f"{server.url}/readyz")
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json() == {"status": "not ready", "reason": reason}
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_who_leaves_is_not_ready(server: LiveServer) -> None:
    cluster = server.daemon.cluster
    nodes = [
        msgspec.structs.replace(node, leaving=node.id == cluster.self_id) for node in cluster.nodes
    ]
    server.daemon.cluster = msgspec.structs.replace(cluster, nodes=nodes)
    response = httpx.get(f"{server.url}/readyz")
    assert (response.status_code, "leaving" in response.text) == (503, True)


def test_status_is_the_struct(server: LiveServer) -> None:
    content = httpx.get(f"{server.url}/cluster/status").content
    assert msgspec.json.decode(content, type=ClusterStatus) == server.daemon.cluster
    assert {"self", "leader", "term", "epoch", "nodes", "models"} <= msgspec.json.decode(
        content
    ).keys()


@pytest.mark.parametrize("path", ["/v1/models", "/healthz", "/cluster/status"])
def test_head_and_options(server: LiveServer, path: str) -> None:
    head = httpx.head(server.url + path)
    assert (head.status_code, head.content) == (200, b"")
    options = httpx.options(server.url + path, headers={"origin": "http://evil.example"})
    assert options.status_code == 204
    assert options.headers["allow"] == "GET, HEAD, OPTIONS"
    assert not [name for name in options.headers if name.startswith("access-control")]


def test_errors_of_routing_have_openais_shape(server: LiveServer) -> None:
    missing = httpx.get(f"{server.url}/v2/x")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "unknown_url"
    wrong = httpx.get(f"{server.url}/v1/chat/completions")
    assert wrong.status_code == 405
    assert wrong.headers["allow"] == "OPTIONS, POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server.url}/healthz/").status_code == 404


def test_ticket(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/cluster/ticket", headers=CONTROL)
    assert response.json() == {"ticket": TICKET}
    assert response.headers["cache-control"] == "no-store"


def test_doctor(server: LiveServer) -> None:
    response = httpx.get(f"{server.url}/cluster/doctor", headers=CONTROL)
    assert msgspec.json.decode(response.content, type=Report) == server.daemon.examined
    assert response.headers["cache-control"] == "no-store"


def test_stop(server: LiveServer) -> None:
    response = httpx.post(f"{server.url}/cluster/stop", headers=CONTROL)
    assert (response.status_code, response.json()) == (202, {"within": 20.0})
    assert server.daemon.stopped.is_set()
    assert not server.daemon.at_once
    server.join()


def test_stop_now(server: LiveServer) -> None:
    url, server.daemon.ends_when_stopped = f"{server.url}/cluster/stop", False
    assert httpx.post(url, headers=CONTROL, json={"now": "x"}).status_code == 400
    assert httpx.post(url, headers=CONTROL, json={"now": True}).json() == {"within": 0.0}
    assert server.daemon.at_once


CONTROL_ROUTES = [
    ("GET", "/cluster/ticket"),
    ("GET", "/cluster/doctor"),
    ("POST", "/cluster/stop"),
    ("POST", "/cluster/key/rotate"),
    ("POST", "/cluster/kick"),
    ("POST", "/cluster/pardon"),
    ("GET", "/cluster/bans"),
    ("POST", "/cluster/drain"),
    ("POST", "/cluster/resume"),
    ("POST", "/cluster/models/use"),
    ("POST", "/cluster/models/stop"),
    ("POST", "/cluster/models/add"),
    ("POST", "/cluster/models/remove"),
]


def test_every_route_that_is_not_for_everybody_is_listed_here() -> None:
    public = {"/v1", "/healthz", "/readyz", "/cluster/status", "/cluster/planning"}
    paths = {route.path for route in create_app(FakeDaemon()).routes}
    control = {path for path in paths if not any(path.startswith(begin) for begin in public)}
    assert control == {path for _, path in CONTROL_ROUTES}


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Pxd-Control": "1"},
        {"X-Pxd-Control": TOKEN[:-1]},
        {"X-Pxd-Control": "t\u00f6ken".encode("latin-1")},
        CONTROL | {"Host": "rebound.example:8470"},
        CONTROL | {"X-Forwarded-For": "203.0.113.5"},
    ],
)
def test_control_is_refused(server: LiveServer, headers: dict[str, str | bytes]) -> None:
    for method, path in CONTROL_ROUTES:
        response = httpx.request(method, server.url + path, headers=headers)
        assert response.status_code == 403
        assert response.json()["error"]["code"] == "forbidden"
        assert TICKET not in response.text
    assert not server.daemon.stopped.is_set()
    assert (server.daemon.door.grace, server.daemon.door.bans) == (None, [])
    assert not server.daemon.drains.drained
    assert server.daemon.choices.choice.names == ("demo",)


def allowed(client: str, server: str, host: str | None, **headers: str) -> bool:
    fields = {"x-pxd-control": TOKEN} | ({"host": host} if host is not None else {}) | headers
    scope = {
        "type": "http",
        "client": (client, 50000),
        "server": (server, 8470),
        "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
    }
    try:
        require_control(Request(scope), TOKEN)
    except ApiError:
        return False
    return True


@pytest.mark.parametrize(
    ("client", "server", "host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1", "127.0.0.1:8470", True),
        ("127.0.0.1", "127.0.0.1", "localhost", True),
        ("127.0.0.1", "127.0.0.1", "LOCALHOST.:8470", True),
        ("127.0.0.1", "127.0.0.1", "127.9.9.9:8470", True),
        ("::1", "::1", "[::1]:8470", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", "127.0.0.1:8470", True),
        # The daemon listens on a LAN address only, and is called from its own machine.
        ("192.168.1.5", "192.168.1.5", "192.168.1.5:8470", True),
        ("192.168.1.6", "192.168.1.5", "192.168.1.5:8470", False),
        ("192.168.1.6", "192.168.1.5", "localhost", False),
        ("127.0.0.1", "127.0.0.1", "evil.example", False),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1.evil.example", False),
        ("127.0.0.1", "127.0.0.1", "localhost.evil.example:8470", False),
        ("127.0.0.1", "127.0.0.1", "192.168.1.5:8470", False),
        ("127.0.0.1", "127.0.0.1", "", False),
        ("127.0.0.1", "127.0.0.1", None, False),
        ("127.0.0.1", "127.0.0.1", "[::1", True),
    ],
)
def test_who_may_control(client: str, server: str, host: str | None, expected: bool) -> None:
    assert allowed(client, server, host) is expected


def test_proxies_may_not_control() -> None:
    assert not allowed("127.0.0.1", "127.0.0.1", "127.0.0.1", forwarded="for=203.0.113.5")
    assert not allowed("127.0.0.1", "127.0.0.1", "127.0.0.1", via="1.1 proxy")
