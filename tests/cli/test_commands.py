"""status, ticket, stop, version and help, against a served fake daemon."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest

import pxd as package
from pxd.cli import stop as stop_module
from tests.api.fakes import DEADLINE_S, TICKET, FakeDaemon, LiveServer, live_server, serving_status

from .tools import command, pxd, run, write_daemon_file


def test_status_in_a_pipe(server: LiveServer) -> None:
    result = pxd("status", "--node", server.url)
    assert result.exit_code == 0
    assert "anna [0,3) → ben [3,6) → carl [6,8)" in result.stdout


def test_status_as_json(server: LiveServer, default_instance: Path) -> None:
    write_daemon_file(default_instance, server.url)
    result = pxd("status", "--json")
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content == msgspec.to_builtins(serving_status())
    assert {"self", "leader", "term", "epoch", "nodes", "models"} <= content.keys()


def test_status_of_a_named_data_dir(server: LiveServer, tmp_path: Path) -> None:
    write_daemon_file(tmp_path / "anna", server.url)
    assert pxd("status", "--data-dir", str(tmp_path / "anna")).exit_code == 0


def test_status_without_a_daemon(server: LiveServer) -> None:
    assert pxd("status").exit_code == 1
    server.__exit__()
    result = pxd("status", "--node", server.url)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"no pxd daemon answers at {server.url}" in result.stderr


def test_something_else_answers(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.daemon, "status", lambda: {"not": "a status"})
    result = pxd("status", "--node", server.url)
    assert result.exit_code == 1
    assert "is not a pxd daemon of this version" in result.stderr


def test_status_as_a_process(server: LiveServer) -> None:
    result = run("status", PXD_NODE=server.url)
    assert result.returncode == 0
    assert "demo   serving" in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_status_where_unicode_is_missing(server: LiveServer) -> None:
    result = run("status", "--node", server.url, PYTHONIOENCODING="ascii")
    assert "anna [0,3) -> ben [3,6)" in result.stdout


def test_watch_goes_on_without_the_daemon_and_ends_by_ctrl_c() -> None:
    with live_server(FakeDaemon()) as server:
        process = subprocess.Popen(
            command("status", "--watch", "--json", "--node", server.url),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            assert process.stdout
            assert process.stderr
            for _ in range(2):
                assert (
                    json.loads(process.stdout.readline())["self"] == server.daemon.cluster.self_id
                )
            server.set(server.daemon.shutdown)
            server.join()
            assert "trying again" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
            process.communicate()


def test_ticket(server: LiveServer, default_instance: Path) -> None:
    write_daemon_file(default_instance, server.url)
    for options in ([], ["--node", server.url], ["--node", f"localhost:{server.port}"]):
        result = pxd("ticket", *options)
        assert (result.exit_code, result.stdout) == (0, f"{TICKET}\n"), result.stderr


@pytest.mark.parametrize("arguments", [["ticket"], ["stop"], ["key", "rotate"], ["kick", "ben"]])
def test_control_needs_the_token_of_that_daemon(
    server: LiveServer, default_instance: Path, tmp_path: Path, arguments: list[str]
) -> None:
    result = pxd(*arguments, "--node", server.url)
    assert result.exit_code == 1
    assert "as the user that runs the daemon, with --data-dir" in result.stderr
    write_daemon_file(default_instance, "http://127.0.0.1:1")
    result = pxd(*arguments, "--node", server.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{server.url} is not the daemon of {default_instance}" in result.stderr
    write_daemon_file(default_instance, server.url, token="of another life")
    result = pxd(*arguments)
    assert result.exit_code == 1
    assert "does not hold the token" in result.stderr
    assert not server.daemon.stopped.is_set()


def test_a_daemon_file_of_somebody_else(
    default_instance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    write_daemon_file(default_instance, "http://127.0.0.1:1")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    result = pxd("ticket")
    assert result.exit_code == 1
    assert "Permission denied; run this as the user that runs the daemon" in result.stderr


def test_ticket_without_a_daemon(default_instance: Path) -> None:
    assert "start one with" in pxd("ticket").stderr
    (default_instance / "cluster.key").write_bytes(bytes(32))
    result = pxd("ticket")
    assert result.exit_code == 1
    assert "the daemon has to run" in result.stderr
    assert f"pxd start --data-dir {default_instance}" in result.stderr


@pytest.mark.parametrize("by_url", [False, True])
def test_stop_waits_for_the_process(
    server: LiveServer, default_instance: Path, by_url: bool
) -> None:
    daemon = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_daemon_file(default_instance, server.url, daemon.pid)

    def end_when_stopped() -> None:
        assert server.daemon.stopped.wait(DEADLINE_S)
        daemon.kill()

    ending = threading.Thread(target=end_when_stopped)
    ending.start()
    result = pxd("stop", *(("--node", server.url) if by_url else ()))
    ending.join()
    # Not reaped yet: a process that has ended counts as gone whoever its parent is.
    assert result.exit_code == 0, result.output
    assert "has left the cluster" in result.stdout
    daemon.communicate()
    assert daemon.returncode == -signal.SIGKILL


def test_stop_does_not_wait_forever(
    server: LiveServer, default_instance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_daemon_file(default_instance, server.url)
    monkeypatch.setattr(stop_module, "GOODBYE_S", 0.2)
    server.daemon.ends_when_stopped = False
    result = pxd("stop", "--now")
    assert server.daemon.at_once
    assert result.exit_code == 1
    assert "still leaving" in result.stderr


def test_stop_says_what_is_waited_for(
    server: LiveServer, default_instance: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_daemon_file(default_instance, server.url)
    monkeypatch.setattr(stop_module, "GOODBYE_S", -19.5)
    server.daemon.ends_when_stopped = False
    server.daemon.cluster = msgspec.structs.replace(
        serving_status(), waits_for="others to load demo"
    )
    result = pxd("stop")
    assert not server.daemon.at_once
    assert result.stderr.startswith("  waiting for others to load demo\n")


def test_stop_without_a_daemon() -> None:
    assert pxd("stop").exit_code == 1


def test_version() -> None:
    expected = f"pxd {package.__version__}\n"
    assert pxd("version").stdout == expected
    assert pxd("--version").stdout == expected


@pytest.mark.parametrize(
    "name", ["start", "status", "doctor", "chat", "ticket", "kick", "stop", "version"]
)
def test_every_command_has_help_with_examples(name: str) -> None:
    assert name in pxd("--help").stdout
    result = pxd(name, "--help")
    assert result.exit_code == 0
    assert "Examples" in result.stdout
    assert f"pxd {name}" in result.stdout.replace("\N{NO-BREAK SPACE}", " ")


def test_no_command_is_a_question_for_help() -> None:
    assert "Commands" in pxd().output


HEAVY = {"libp2p", "mlx", "mlx_lm", "transformers", "trio", "starlette", "hypercorn", "numpy"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["start", "--help"], ["status"], ["doctor"], ["chat", "hi"]]
)
def test_commands_import_little(
    server: LiveServer, default_instance: Path, arguments: list[str]
) -> None:
    write_daemon_file(default_instance, server.url)
    script = (
        "import sys, runpy\n"
        f"sys.argv = ['pxd', *{arguments!r}]\n"
        "try: runpy.run_module('pxd', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('imported', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env={"PXD_NODE": server.url, "PXD_DATA_DIR": str(default_instance), "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.splitlines()[-1].split()[1:])
    assert "typer" in imported
    assert not imported & HEAVY
