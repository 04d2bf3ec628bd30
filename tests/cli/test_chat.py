"""`pxd chat`: one-shot in this process, conversations at a real pseudo-terminal."""

import os
import pty
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import trio

from pxd.cli import chat as chat_module
from pxd.cli import conversation as conversation_module
from pxd.cli.client import Client, StreamFailed
from pxd.cli.conversation import Conversation, Options
from pxd.serving.requests import Delta, GenerationFailed, Message, NotReady
from tests.api.fakes import DEADLINE_S, FakeAnswer, LiveServer

from .tools import command, pxd


def test_one_answer_and_nothing_else(server: LiveServer) -> None:
    result = pxd("chat", "--node", server.url, "What is", "2 + 3?")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "What is 2 + 3?\n", "")
    assert server.daemon.ingress.calls[0][1] == (Message("user", "What is 2 + 3?"),)


def test_options_reach_the_model(server: LiveServer) -> None:
    options = ["--model", "demo", "--max-tokens", "9", "--temperature", "0", "--seed", "4"]
    result = pxd("chat", "--node", server.url, *options, "--system", "Be kind.", "hi")
    assert result.exit_code == 0
    [(model, messages, generation)] = server.daemon.ingress.calls
    assert model == "demo"
    assert messages == (Message("system", "Be kind."), Message("user", "hi"))
    assert (generation.max_tokens, generation.temperature, generation.seed) == (9, 0, 4)


def test_a_question_on_the_standard_input(server: LiveServer) -> None:
    assert pxd("chat", "--node", server.url, stdin="hello\n").stdout == "hello\n"
    assert pxd("chat", "--node", server.url, stdin="\n").exit_code == 2


def test_control_characters_are_not_passed_on(server: LiveServer) -> None:
    server.daemon.ingress.scripts.append([Delta("a\x1b[2Jb", 1, "stop")])
    assert pxd("chat", "--node", server.url, "hi").stdout == "a\ufffd[2Jb\n"


def test_not_ready_is_waited_for(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation_module, "DEFAULT_RETRY_S", 0.01)
    server.daemon.ingress.refusals += [NotReady("ben is loading")] * 3
    result = pxd("chat", "--node", server.url, "hi")
    assert (result.exit_code, result.stdout) == (0, "hi\n")
    assert result.stderr == "pxd: ben is loading; waiting\n"


def test_not_ready_is_not_waited_for_forever(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_module, "PATIENCE_S", 0.0)
    server.daemon.ingress.refusals += [NotReady("4 GiB are missing")] * 2
    result = pxd("chat", "--node", server.url, "hi")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "pxd: 4 GiB are missing\n" in result.stderr


def test_failures_in_plain_words(server: LiveServer) -> None:
    result = pxd("chat", "--node", server.url, "--model", "other", "hi")
    assert result.exit_code == 1
    assert result.stderr == "pxd: The model 'other' is not served by this cluster\n"
    server.daemon.ingress.scripts.append([Delta("so", 1), GenerationFailed("all heads are gone")])
    result = pxd("chat", "--node", server.url, "hi")
    assert (result.exit_code, result.stdout) == (1, "so\n")
    assert result.stderr == "pxd: all heads are gone\n"
    server.__exit__()
    result = pxd("chat", "--node", server.url, "hi")
    assert result.exit_code == 1
    assert "no pxd daemon answers" in result.stderr


def test_a_server_that_ends_amid_the_answer(server: LiveServer) -> None:
    server.daemon.ingress.scripts.append([Delta("so", 1), trio.Event()])
    with closing(Conversation(Client(server.url), Options()).ask("hi")) as pieces:
        assert next(pieces) == "so"
        server.set(server.daemon.shutdown)
        with pytest.raises(StreamFailed, match="amid the answer"):
            next(pieces)


def test_thoughts_are_no_part_of_the_answer(server: LiveServer) -> None:
    deltas = [Delta("", 1, thought="So "), Delta("Yes", 2, thought="be it."), Delta("", 0, "stop")]
    server.daemon.ingress.scripts.append(list(deltas))
    talk = Conversation(Client(server.url), Options())
    thoughts: list[str] = []
    talk.on_thought = thoughts.append
    assert "".join(talk.ask("well?")) == "Yes"
    assert "".join(thoughts) == "So be it."
    assert list(talk.ask("and?")) == ["and?"]
    _, messages, _ = server.daemon.ingress.calls[-1]
    assert [message.content for message in messages] == ["well?", "Yes", "and?"]


def test_a_conversation_remembers(server: LiveServer) -> None:
    talk = Conversation(Client(server.url), Options(), "Be kind.")
    assert "".join(talk.ask("one")) == "one"
    assert (talk.summary.tokens, talk.summary.finish) == (2, "stop")
    assert "".join(talk.ask("two")) == "two"
    assert server.daemon.ingress.calls[-1][1] == (
        Message("system", "Be kind."),
        Message("user", "one"),
        Message("assistant", "one"),
        Message("user", "two"),
    )
    talk.forget()
    list(talk.ask("three"))
    assert server.daemon.ingress.calls[-1][1] == (
        Message("system", "Be kind."),
        Message("user", "three"),
    )


def test_leaving_an_answer_cancels_it_and_remembers_its_beginning(server: LiveServer) -> None:
    server.daemon.ingress.scripts.append([Delta("so", 1), trio.Event()])
    talk = Conversation(Client(server.url), Options())
    with closing(talk.ask("one")) as pieces:
        assert next(pieces) == "so"
    assert server.daemon.ingress.answers[0].cancelled
    list(talk.ask("two"))
    assert [m.content for m in server.daemon.ingress.calls[-1][1]] == ["one", "so", "two"]


class Terminal:
    """A person at `pxd chat`."""

    def __init__(self, *arguments: str) -> None:
        self._primary, secondary = pty.openpty()
        self.process = subprocess.Popen(
            command(*arguments),
            stdin=secondary,
            stdout=secondary,
            stderr=secondary,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
        )
        os.close(secondary)
        self.shown = ""

    def expect(self, text: str) -> None:
        """Wait until `text` is shown; forget what came before it."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            ready, _, _ = select.select([self._primary], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not appear after {self.shown!r}"
            self.shown += os.read(self._primary, 65536).decode()
        self.shown = self.shown.partition(text)[2]

    def type(self, text: str) -> None:
        os.write(self._primary, text.encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._primary)


@pytest.fixture
def terminal(server: LiveServer) -> Iterator[Terminal]:
    with closing(Terminal("chat", "--node", server.url)) as terminal:
        yield terminal


def first_answer(server: LiveServer) -> FakeAnswer:
    deadline = time.monotonic() + DEADLINE_S
    while not server.daemon.ingress.answers:
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)
    return server.daemon.ingress.answers[0]


def test_a_conversation_at_a_terminal(server: LiveServer, terminal: Terminal) -> None:
    server.daemon.ingress.scripts.append([Delta("The beginning", 1), trio.Event()])
    terminal.expect("demo (serving)")
    terminal.expect("> ")
    terminal.type("tell me\n")
    terminal.expect("The beginning")
    terminal.interrupt()
    terminal.expect("(stopped)")
    assert first_answer(server).cancelled
    terminal.expect("> ")
    terminal.type("hello there\n")
    terminal.expect("hello there")
    terminal.expect("hello there")
    terminal.expect("3 tokens")
    terminal.expect("> ")
    terminal.type("/new\n")
    terminal.expect("a new conversation")
    terminal.expect("> ")
    server.daemon.ingress.scripts.append([GenerationFailed("all heads are gone")])
    terminal.type("again\n")
    terminal.expect("all heads are gone")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert [m.content for m in server.daemon.ingress.calls[1][1]] == [
        *("tell me", "The beginning", "hello there"),
    ]
    assert [m.content for m in server.daemon.ingress.calls[2][1]] == ["again"]


def test_an_interrupt_at_the_prompt_does_not_leave(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = iter([KeyboardInterrupt(), "hello", EOFError()])

    def type_next(_: str) -> str:
        item = next(typed)
        if isinstance(item, BaseException):
            raise item
        return item

    monkeypatch.setattr("builtins.input", type_next)
    chat_module.converse(Conversation(Client(server.url), Options()))
    output = capsys.readouterr().out
    assert "Ctrl-D leaves" in output.partition("starts over")[2]
    assert "\nhello\n" in output


def test_waiting_at_a_terminal_can_be_stopped(server: LiveServer, terminal: Terminal) -> None:
    server.daemon.ingress.refusals += [NotReady("ben is loading")] * 1000
    terminal.expect("> ")
    terminal.type("hi\n")
    terminal.expect("waiting: ben is loading")
    terminal.interrupt()
    terminal.expect("(stopped)")


def test_a_conversation_needs_a_daemon(server: LiveServer) -> None:
    server.__exit__()
    with closing(Terminal("chat", "--node", server.url)) as terminal:
        terminal.expect("no pxd daemon answers")
        assert terminal.process.wait(DEADLINE_S) == 1
