"""`pxd start`: its options, its welcome, its log and its exit codes. The daemon is a stand-in."""

import io
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.cli import logs, welcome
from pxd.cli.start import BadOption, build_settings, resolve_model
from pxd.identity import IdentityError, Ticket
from pxd.settings import Settings

from .tools import pxd, run

TICKET = str(Ticket(bytes(range(32)), ("/ip4/192.0.2.1/tcp/8471",)))


class StartupError(Exception):
    pass


class Started:
    name, http, peer_id, ticket = "anna", "http://127.0.0.1:8470", "12D3KooW", TICKET


class FakeNode(types.ModuleType):
    """Stands in for `pxd.node`: takes its settings, says that it is up, ends as it is told."""

    StartupError = StartupError

    def __init__(self) -> None:
        super().__init__("pxd.node")
        self.settings: Settings | None = None
        self.failure: BaseException | None = None

    async def run(self, settings: Settings, *, started: Any) -> None:
        self.settings = settings
        if self.failure:
            raise self.failure
        started(Started())


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    import pxd

    fake = FakeNode()
    monkeypatch.setitem(sys.modules, "pxd.node", fake)
    monkeypatch.setattr(pxd, "node", fake, raising=False)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield fake
    logging.captureWarnings(capture=False)
    root.handlers[:], root.level = handlers, level


def test_every_option_becomes_a_setting(node: FakeNode, tmp_path: Path) -> None:
    result = pxd(
        *("start", "--model", str(tmp_path), "--join", TICKET, "--data-dir", str(tmp_path)),
        *("--http", "127.0.0.1:0", "--listen", "[::]:9000", "--name", "ben", "--memory", "7.5"),
        *("--max-layers", "4", "--kv-tier", "20", "--priority", "-5", "--no-mdns", "--relay"),
        *("--leave-timeout", "5", "--admission", "reserve", "--request-timeout", "90.5"),
        *("--speculate", "off", "--wire-dtype", "auto", "--executor", "sglang", "--tp", "2"),
        *("--log-format", "json"),
    )
    assert result.exit_code == 0, result.output
    assert node.settings == Settings(
        data_dir=tmp_path,
        name="ben",
        model=str(tmp_path),
        join=TICKET,
        http="127.0.0.1:0",
        listen="[::]:9000",
        memory=7.5,
        max_layers=4,
        kv_tier=20.0,
        request_timeout=90.5,
        leave_timeout=5.0,
        admission="reserve",
        speculate="off",
        wire_dtype="auto",
        executor="sglang",
        tensor_parallel=2,
        priority=-5,
        mdns=False,
        relay=True,
        log_format="json",
    )


def test_defaults(node: FakeNode, default_instance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PXD_JOIN", TICKET)
    assert pxd("start").exit_code == 0
    assert node.settings is not None
    assert node.settings.data_dir == default_instance
    assert node.settings.join == TICKET
    assert node.settings.name
    assert node.settings.mdns
    assert not node.settings.relay
    assert node.settings.wire_dtype == "native"
    assert node.settings.executor == "auto"
    assert (node.settings.http, node.settings.listen, node.settings.model) == (None, None, None)


def test_the_welcome(node: FakeNode, default_instance: Path) -> None:
    output = pxd("start").stdout
    assert "node anna is up" in output
    assert "http://127.0.0.1:8470/v1" in output
    assert f"pxd status --data-dir {default_instance}" in output
    assert f"\n  pxd start --join {TICKET}\n" in output


def test_a_journal_gets_no_ticket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "journal").open("w") as journal, (tmp_path / "other").open("w") as other:
        status = os.fstat(journal.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert welcome.is_journal(journal)
        assert not welcome.is_journal(other)
        assert not welcome.is_journal(io.StringIO())
    settings = Settings(data_dir=tmp_path / "my node", name="anna")
    text = welcome.text(settings, Started(), show_ticket=False)  # type: ignore[arg-type]
    assert TICKET not in text
    assert f"pxd ticket --data-dir '{tmp_path}/my node'" in text


@pytest.mark.parametrize("error", [StartupError, IdentityError])
def test_what_people_must_know_is_one_line(node: FakeNode, error: type[Exception]) -> None:
    node.failure = error("the port is taken; choose another")
    result = pxd("start")
    assert result.exit_code == 1
    assert result.stderr == "pxd: the port is taken; choose another\n"


def test_an_interrupt_before_the_daemon_is_up(node: FakeNode) -> None:
    node.failure = KeyboardInterrupt()
    assert pxd("start").exit_code == 130


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--join", "pxd1nonsense", "not a pxd ticket"),
        ("--join", "", "not a pxd ticket"),
        ("--http", "8470", "not HOST:PORT"),
        ("--http", "127.0.0.1:x", "not HOST:PORT"),
        ("--listen", "[::1]:70000", "not HOST:PORT"),
        ("--kv-tier", "0", "keep nothing"),
        ("--kv-tier", "inf", "keep nothing"),
        ("--request-timeout", "0", "not between"),
        ("--leave-timeout", "-1", "not between"),
        ("--leave-timeout", "3601", "not between"),
        ("--request-timeout", "nan", "not between"),
        ("--request-timeout", "86401", "not between"),
        ("--memory", "0", "nothing to offer"),
        ("--memory", "-1", "nothing to offer"),
        ("--memory", "nan", "nothing to offer"),
        ("--max-layers", "0", "give 1 or more"),
        ("--tp", "2", "only --executor sglang"),
        ("--tp", "0", "not between 1 and 64"),
        ("--priority", "1001", "not between -1000 and 1000"),
        ("--name", "", "1 to 64"),
        ("--name", "a\x1b[31m", "1 to 64"),
        ("--name", "x" * 65, "1 to 64"),
        ("--model", "./nowhere", "no directory"),
        ("--model", "", "no directory"),
    ],
)
def test_bad_values_end_early_with_one_line(
    node: FakeNode, option: str, value: str, reason: str
) -> None:
    result = pxd("start", option, value)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"pxd: {option}: ")
    assert reason in result.stderr
    assert result.stderr.count("\n") == 1
    assert node.settings is None


def test_bad_values_as_a_process() -> None:
    result = run("start", "--join", "nonsense")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model(None) is None
    assert resolve_model("demo") == "demo"
    assert resolve_model("./demo") == str(tmp_path / "demo")
    assert resolve_model("org/name") == str(tmp_path / "org" / "name")
    assert resolve_model("~/org") == str(tmp_path / "org")
    assert resolve_model("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    with pytest.raises(BadOption):
        resolve_model("~/nowhere")


def test_a_relative_data_dir_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_settings(data_dir=Path("here")).data_dir == tmp_path / "here"


def record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("pxd.p2p", logging.WARNING, "f", 1, message, arguments, None)


def test_a_log_line_as_text() -> None:
    line = logs.TextFormatter().format(record("refused %s", "ben\n2026 ERROR forged\x1b[2J"))
    assert line.endswith(r"WARNING pxd.p2p: refused ben\n2026 ERROR forged\x1b[2J")


@given(st.text())
def test_a_message_is_one_line_whatever_it_quotes(text: str) -> None:
    assert len(logs.TextFormatter().format(record("%s", text)).splitlines()) == 1
    content = json.loads(logs.JsonFormatter().format(record("%s", text)))
    assert content["message"] == text


def test_a_log_line_as_json() -> None:
    try:
        raise ZeroDivisionError("boom")
    except ZeroDivisionError:
        entry = record("failed")
        entry.exc_info = sys.exc_info()
    line = logs.JsonFormatter().format(entry)
    assert "\n" not in line
    content = json.loads(line)
    assert (content["level"], content["logger"]) == ("warning", "pxd.p2p")
    assert content["time"].endswith("+00:00")
    assert "boom" in content["exception"]


def test_what_is_logged() -> None:
    script = (
        "import logging, warnings; from pxd.cli import logs; logs.set_up('json')\n"
        "logging.getLogger('pxd.node').info('up'); logging.getLogger('libp2p').info('chatter')\n"
        "logging.getLogger('libp2p').warning('trouble'); warnings.warn('old')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == ""
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["pxd.node", "libp2p", "py.warnings"]
