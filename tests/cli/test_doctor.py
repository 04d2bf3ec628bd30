"""`pxd doctor`: what is shown, exit codes, and what happens without a daemon that answers."""

import json
import os
import socket
from pathlib import Path

import msgspec
import pytest

from pxd.cli import client, doctor
from pxd.doctor.findings import Finding, Report, problem, warning
from tests.api.fakes import LiveServer, report

from .tools import ended_pid, pxd, run, write_daemon_file

BLOCKED = problem(
    "reach",
    "ben cannot connect to this machine on port 8471: no answer",
    "open TCP 8471:\nsudo ufw allow 8471/tcp",
    ("from ben: 10.0.0.1 (eth0) no answer",),
)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Finding, bool]]:
    """The examinations made without a daemon; they take no time here."""
    made: list[tuple[Path, Finding, bool]] = []

    def fake(data_dir: Path, first: Finding, *, silent: bool = False) -> Report:
        made.append((data_dir, first, silent))
        return msgspec.structs.replace(report(), daemon=False, healthy=False, findings=(first,))

    monkeypatch.setattr(doctor, "_without_daemon", fake)
    return made


@pytest.fixture
def server(server: LiveServer, default_instance: Path) -> LiveServer:
    """With the token, which is asked for, where the default instance has it."""
    write_daemon_file(default_instance, server.url)
    return server


def test_all_is_well(server: LiveServer) -> None:
    result = pxd("doctor", "--node", server.url)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "pxd doctor  anna  pxd 0.1.0",
        "",
        "✓ daemon the daemon is up for 3 min at http://127.0.0.1:8470, pxd 0.1.0",
        "· links  ben over 5 ms away",
        "           ben: 7.10 ms",
        "           → a cable helps most",
        "",
        "no problems found  1.2 s",
    ]


def test_a_problem_comes_with_commands_to_copy(server: LiveServer) -> None:
    slow = warning("clock", "the clock of ben is 7 s ahead", "put the wrong one right")
    server.daemon.examined = report(BLOCKED, slow)
    result = pxd("doctor", "--node", server.url)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    at = lines.index("✗ reach  ben cannot connect to this machine on port 8471: no answer")
    assert [line.strip() for line in lines[at + 1 : at + 4]] == [
        "from ben: 10.0.0.1 (eth0) no answer",
        "→ open TCP 8471:",
        "sudo ufw allow 8471/tcp",
    ]
    assert lines[at + 4].startswith("! clock")
    assert lines[-1].startswith("1 problem, 1 warning")


def test_warnings_alone_are_no_failure(server: LiveServer) -> None:
    server.daemon.examined = report(warning("clock", "wrong", "mend it"))
    result = pxd("doctor", "--node", server.url)
    assert result.exit_code == 0
    assert "1 warning " in result.stdout


def test_json(server: LiveServer) -> None:
    server.daemon.examined = report(BLOCKED)
    result = pxd("doctor", "--json")
    assert result.exit_code == 1
    content = json.loads(result.stdout)
    assert content["healthy"] is False
    assert msgspec.convert(content, Report) == server.daemon.examined


def test_what_others_say_steers_no_terminal(server: LiveServer) -> None:
    server.daemon.examined = report(warning("version", "evil\x1b[2Jnode", "look\x07", ("a\tb\r",)))
    result = pxd("doctor", "--node", server.url)
    assert not {"\x1b", "\x07", "\r", "\t"} & set(result.stdout)


def test_as_a_process_in_a_pipe(server: LiveServer) -> None:
    server.daemon.examined = report(BLOCKED)
    result = run("doctor", "--node", server.url, PYTHONIOENCODING="ascii")
    assert result.returncode == 1
    assert "X reach  ben cannot" in result.stdout
    assert "-> open TCP 8471:" in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_no_daemon(alone: list[tuple[Path, Finding, bool]], default_instance: Path) -> None:
    result = pxd("doctor")
    assert result.exit_code == 1
    assert "no daemon: only this machine was looked at" in result.stdout
    [(directory, first, silent)] = alone
    assert (directory, silent) == (default_instance, False)
    assert first.level == "problem"
    assert f"pxd start --data-dir {default_instance}" in first.remedy.splitlines()


def test_a_daemon_that_died(alone: list[tuple[Path, Finding, bool]], tmp_path: Path) -> None:
    write_daemon_file(tmp_path / "anna", "http://127.0.0.1:1", ended_pid())
    assert pxd("doctor", "--data-dir", str(tmp_path / "anna")).exit_code == 1
    [(directory, first, _)] = alone
    assert directory == tmp_path / "anna"
    assert "ended without saying goodbye" in first.text


def test_a_daemon_that_hangs(
    alone: list[tuple[Path, Finding, bool]],
    default_instance: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "DOCTOR_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        write_daemon_file(default_instance, f"http://127.0.0.1:{mute.getsockname()[1]}")
        assert pxd("doctor").exit_code == 1
    [(_, first, silent)] = alone
    assert silent
    assert f"process {os.getpid()}) runs, but does not answer" in first.text
    assert f"kill {os.getpid()}" in first.remedy.splitlines()


def test_another_machine(server: LiveServer, alone: list[object]) -> None:
    result = pxd("doctor", "--node", "http://127.0.0.1:1")
    assert result.exit_code == 1
    assert "run this on its machine" in result.stderr
    assert not alone


def test_a_daemon_that_refuses(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = client.Refused("Refused: only programs on its own machine", "forbidden", None)

    def refuse(self: client.Client) -> Report:
        raise refusal

    monkeypatch.setattr(client.Client, "doctor", refuse)
    result = pxd("doctor", "--node", server.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "run `pxd doctor` there" in result.stderr
    refusal.code = "unknown_url"
    assert "update pxd there" in pxd("doctor", "--node", server.url).stderr


def test_without_a_daemon_for_real(default_instance: Path) -> None:
    """The machine is whatever it is; the order and the cause are not."""
    result = run("doctor", "--json", PXD_DATA_DIR=str(default_instance))
    assert result.returncode == 1, result.stderr
    findings = json.loads(result.stdout)["findings"]
    assert findings[0]["check"] == "daemon"
    assert "no daemon runs" in findings[0]["text"]
    assert {"firewall", "multicast", "disk", "executor"} <= {each["check"] for each in findings}
