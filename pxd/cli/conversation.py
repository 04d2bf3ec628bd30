"""One conversation with a model: what was said, and asking for the next answer."""

import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import msgspec

from pxd.cli.client import Client, Refused
from pxd.cli.words import clean_answer

DEFAULT_RETRY_S = 2.0


class Options(msgspec.Struct, frozen=True):
    """What is sent along with the messages; None leaves it to the daemon."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None


class Summary(msgspec.Struct):
    """How an answer went. Seconds; `tokens` is 0 until the answer is complete."""

    tokens: int = 0
    until_first: float = 0.0
    total: float = 0.0
    finish: str = ""

    @property
    def rate(self) -> float:
        """Tokens per second after the first."""
        elapsed = self.total - self.until_first
        return (self.tokens - 1) / elapsed if self.tokens > 1 and elapsed > 0 else 0.0


class Conversation:
    """`on_thought` is told what a thinking model thinks; nothing of that is part of its answers."""

    def __init__(self, client: Client, options: Options, system: str | None = None) -> None:
        self.client = client
        self._options = {
            field: value
            for field, value in msgspec.structs.asdict(options).items()
            if value is not None
        }
        self._system = [{"role": "system", "content": system}] if system else []
        self._said: list[dict[str, str]] = []
        self.summary = Summary()
        self.on_thought: Callable[[str], None] = lambda _: None

    def forget(self) -> None:
        """Start anew; the system message stays."""
        self._said = []

    def ask(self, question: str) -> Generator[str, None, None]:
        """The answer, piece by piece. What arrived of it is remembered, even if it breaks off.

        Raises what `Client.chat` raises. Closing the iterator cancels the answer everywhere.
        """
        self.summary = Summary()
        message = {"role": "user", "content": question}
        answer: list[str] = []
        began = time.monotonic()
        request: dict[str, Any] = {
            **self._options,
            "messages": [*self._system, *self._said, message],
            "stream_options": {"include_usage": True},
        }
        try:
            with closing(self.client.chat(request)) as chunks:
                for chunk in chunks:
                    text = self._read(chunk, began)
                    if text:
                        answer.append(text)
                        yield text
        finally:
            if answer:
                self._said += [message, {"role": "assistant", "content": "".join(answer)}]

    def _read(self, chunk: dict[str, Any], began: float) -> str:
        summary = self.summary
        summary.total = time.monotonic() - began
        if usage := chunk.get("usage"):
            summary.tokens = int(usage["completion_tokens"])
        text = thought = ""
        for choice in chunk.get("choices", ()):
            thought += choice["delta"].get("reasoning_content") or ""
            text += choice["delta"].get("content") or ""
            summary.finish = choice.get("finish_reason") or summary.finish
        if (thought or text) and not summary.until_first:
            summary.until_first = summary.total
        if thought:
            self.on_thought(clean_answer(thought))
        return clean_answer(text)

    def ask_patiently(
        self, question: str, on_wait: Callable[[str], None], patience: float
    ) -> Generator[str, None, None]:
        """Like `ask`; while the cluster is not ready, says why and asks again.

        Gives up, with `Refused`, once it has waited for `patience` seconds.
        """
        deadline = time.monotonic() + patience
        while True:
            try:
                yield from self.ask(question)
                return
            except Refused as error:
                if error.code != "not_ready" or time.monotonic() >= deadline:
                    raise
                on_wait(str(error))
                pause = DEFAULT_RETRY_S if error.retry_after is None else error.retry_after
            time.sleep(max(0.0, min(pause, DEFAULT_RETRY_S, deadline - time.monotonic())))
