"""Names to directories, the hub's part against a small server that speaks like it.

The hub client reads its settings when it is imported, so each fetch runs in a process of its own.
"""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pxd.models import catalog
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.library import Library
from tests.models.files import model_shapes, write_model, write_sharded
from tests.tiny_models import save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "c0ffee" * 6 + "c0ff"


class Hub(ThreadingHTTPServer):
    """Serves repositories from directories and remembers which files were asked for."""

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.fetched: list[str] = []
        self.revisions: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *args: object) -> None:
        """Not into the test's output."""

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        name = "/".join(path.removeprefix("/api/models").strip("/").split("/")[:2])
        if name == "acme/gated":
            self._fail(403, "GatedRepo")
        elif name not in self.server.repositories:
            self._fail(401 if name == "acme/private" else 404, "RepoNotFound")
        elif path == f"/api/models/{name}/tree/{COMMIT}":
            self._send(json.dumps(self._tree(name)).encode())
        elif path.startswith("/api/models/"):
            revision = re.search("/revision/([^/]+)", path)
            self.server.revisions.append(revision[1] if revision else "")
            self._send(json.dumps(self._info(name)).encode())
        else:
            match = re.fullmatch(rf"/{name}/resolve/([^/]+)/(.+)", path)
            self.server.revisions.append(match[1] if match else "")
            file = self.server.repositories[name] / (match[2] if match else "nothing")
            if not file.is_file():
                self._fail(404, "EntryNotFound")
                return
            if with_body:
                self.server.fetched.append(file.name)
            self._send(file.read_bytes(), with_body=with_body)

    def _info(self, name: str) -> dict[str, object]:
        files = sorted(path.name for path in self.server.repositories[name].iterdir())
        return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}

    def _tree(self, name: str) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": path.name,
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(self.server.repositories[name].iterdir())
        ]

    def _send(self, data: bytes, *, with_body: bool = True) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    repositories = {
        "acme/sharded": write_sharded(tmp_path / "sharded", model_shapes(), shards=6),
        "acme/single": write_model(tmp_path / "single"),
        "acme/pickled": tmp_path / "pickled",
        "acme/empty": tmp_path / "empty",
    }
    for name in ("sharded", "single"):
        save_tokenizer(tmp_path / name)
        (tmp_path / name / "modeling_evil.py").write_text("raise SystemExit")
    for name in ("pickled", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with Hub(repositories) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


FETCH = """
import json, os, sys
from pxd.models import catalog
from pxd.models.errors import ModelError
seen = []
name, *layers = json.loads(sys.argv[1])
try:
    fetch = catalog.fetch_layers if layers else catalog.fetch_metadata
    pinned = {"revision": os.environ["REVISION"]} if "REVISION" in os.environ else {}
    print(json.dumps([str(fetch(name, *layers, seen.append, **pinned)), seen]))
except ModelError as error:
    print(json.dumps([f"ModelError: {error}", seen]))
"""


def fetch(
    hub: Hub, home: Path, *arguments: object, revision: str = "", **environment: str
) -> tuple[str, list[float]]:
    """Call the catalog with `home` as the hub client's cache; returns (directory, progress)."""
    if revision:
        environment["REVISION"] = revision
    result = subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps(arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    place, progress = json.loads(result.stdout)
    return place, progress


def test_a_stage_fetches_metadata_and_its_own_shards_only(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    place, _ = fetch(hub, home, "acme/sharded")
    assert not [file for file in hub.fetched if file.endswith(".safetensors")]
    assert "modeling_evil.py" not in hub.fetched
    checkpoint = describe_checkpoint(Path(place))
    assert len(checkpoint.missing) == 6
    assert checkpoint.layers == 3

    hub.fetched.clear()
    again, progress = fetch(hub, home, "acme/sharded", 1, 2)
    assert again == place
    wanted = checkpoint.shards["model.layers.1.mlp.weight"]
    assert [file for file in hub.fetched if file.endswith(".safetensors")] == [wanted]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    assert len(describe_checkpoint(Path(place)).missing) == 5

    hub.fetched.clear()
    fetch(hub, home, "acme/sharded", 1, 2)
    assert hub.fetched == []


def test_what_is_cached_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    place, _ = fetch(hub, home, "acme/sharded", 1, 2)
    hub.fetched.clear()
    assert fetch(hub, home, "acme/sharded", 1, 2, HF_HUB_OFFLINE="1")[0] == place
    assert hub.fetched == []
    lacking, _ = fetch(hub, home, "acme/sharded", 0, 1, HF_HUB_OFFLINE="1")
    assert re.match("ModelError: .*HF_HUB_OFFLINE", lacking)


def test_a_revision_can_be_pinned(hub: Hub, tmp_path: Path) -> None:
    """The hub's answers are those of one commit, whatever is asked for: the paths tell."""
    fetch(hub, tmp_path / "home", "acme/sharded", 1, 2, revision=COMMIT)
    assert {revision for revision in hub.revisions if revision} == {COMMIT}


def test_weights_in_one_file_come_with_the_metadata(hub: Hub, tmp_path: Path) -> None:
    place, progress = fetch(hub, tmp_path / "home", "acme/single")
    checkpoint = describe_checkpoint(Path(place))
    assert checkpoint.exact
    assert checkpoint.layer_bytes == (128, 256, 384)
    assert progress[-1] == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("acme/gated", "accept its terms"),
        ("acme/unknown", "no model acme/unknown"),
        ("acme/private", "HF_TOKEN"),
        ("acme/pickled", "safetensors weights"),
        ("acme/empty", r"no config\.json"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: Hub, tmp_path: Path, name: str, message: str
) -> None:
    answer, _ = fetch(hub, tmp_path / "home", name)
    assert re.search(f"ModelError: .*{message}", answer)


def test_an_unreachable_hub_is_explained(hub: Hub, tmp_path: Path) -> None:
    answer, _ = fetch(
        hub, tmp_path / "home", "acme/sharded", HF_ENDPOINT="http://127.0.0.1:9", NO_PROXY="*"
    )
    assert re.search("ModelError: .*cannot be reached", answer)


def test_a_full_disk_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match="set HF_HOME to a larger disk"):
        catalog.fetch_metadata("acme/large")


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    seen: list[float] = []
    directory = write_model(tmp_path / "model")
    assert catalog.fetch_metadata(str(directory)) == directory
    assert catalog.fetch_layers(str(directory), 0, 2, seen.append) == directory
    assert seen == [1.0]
    with pytest.raises(ModelError, match=r"no config\.json"):
        catalog.fetch_metadata(str(tmp_path))


@pytest.mark.parametrize(
    "name", ["", "nonsense", "../../nowhere", "a/b/c", "/no/such/place", "acme/..", "x y/z", "-a/b"]
)
def test_a_name_that_means_nothing_is_refused_without_asking_anyone(name: str) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        catalog.fetch_metadata(name)


@pytest.mark.parametrize("name", ["acme/a--b", "acme/a.git", "acme/a-", "acme-/a"])
def test_what_the_hub_would_not_call_a_model_is_refused_by_all(name: str) -> None:
    for find in (catalog.fetch_metadata, catalog.cached_directory):
        with pytest.raises(ModelError, match="is no hub id"):
            find(name)
    assert Library(Path("nowhere")).find(name) is None


def test_demo_is_the_bundled_model() -> None:
    assert catalog.fetch_metadata("demo") == catalog.DEMO_DIRECTORY
