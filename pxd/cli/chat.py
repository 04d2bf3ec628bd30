"""`pxd chat`: talk to the model, from any node."""

import math
import sys
from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated

import typer

from pxd.cli.options import DataDir, Node, fail, with_examples

if TYPE_CHECKING:
    from rich.status import Status

    from pxd.cli.conversation import Conversation, Summary

HELP = with_examples(
    "Talk to the model. With a question, print only the answer.",
    ("pxd chat", "a conversation, until Ctrl-D"),
    ('pxd chat "What is 2 + 3?"', "one answer"),
    ("pxd chat < question.txt", "the same, from a file"),
    ("pxd chat --node http://ben:8470", "ask another node"),
)

# For how long a program waits for a cluster that is not ready; a person decides by Ctrl-C.
PATIENCE_S = 60.0
THOUGHTS_SHOWN = 60

Question = Annotated[
    list[str] | None, typer.Argument(metavar="QUESTION", help="What to ask.", show_default=False)
]
Model = Annotated[str | None, typer.Option("--model", metavar="M", help="The model to ask.")]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="A system message to begin with.")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", min=1, help="The longest answer.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", min=0, max=2, help="0 is the likeliest answer."),
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help="Repeats the same draw of tokens.")
]


def chat(
    question: Question = None,
    node: Node = None,
    data_dir: DataDir = None,
    model: Model = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
) -> None:
    from pxd.cli.client import Client
    from pxd.cli.conversation import Conversation, Options
    from pxd.cli.find import NoDaemon, find_daemon

    try:
        client = Client(find_daemon(node, data_dir).url)
    except NoDaemon as error:
        fail(str(error))
    options = Options(model=model, max_tokens=max_tokens, temperature=temperature, seed=seed)
    conversation = Conversation(client, options, system)
    words = " ".join(question or ())
    if not words and not sys.stdin.isatty():
        words = sys.stdin.read().strip()
        if not words:
            fail("there is no question on the standard input", 2)
    if words:
        _once(conversation, words)
    else:
        converse(conversation)


class _Progress:
    """A spinner while nothing is said yet; where nobody watches, a line for every new reason."""

    def __init__(self) -> None:
        self._spinner: Status | None = None
        self._reason = self._thoughts = ""
        if sys.stderr.isatty():
            from rich.console import Console

            self._spinner = Console(stderr=True, highlight=False).status("")
            self._spinner.start()

    def wait(self, reason: str) -> None:
        if reason == self._reason:
            return
        self._reason = reason
        if self._spinner is None:
            print(f"pxd: {reason}; waiting", file=sys.stderr)
        else:
            from rich.text import Text

            self._spinner.update(Text(f"waiting: {reason}", "yellow"))

    def think(self, thought: str) -> None:
        self._thoughts = (self._thoughts + thought)[-THOUGHTS_SHOWN:]
        if self._spinner is not None:
            from rich.text import Text

            shown = " ".join(self._thoughts.split())
            self._spinner.update(Text(f"thinking: {shown}", "bright_black"))

    def end(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()


def _pieces(
    conversation: "Conversation", question: str, patience: float
) -> Generator[str, None, None]:
    """The answer's pieces, with a sign of life until the first."""
    progress = _Progress()
    conversation.on_thought = progress.think
    try:
        with closing(conversation.ask_patiently(question, progress.wait, patience)) as pieces:
            for piece in pieces:
                progress.end()
                yield piece
    finally:
        progress.end()


def _say(conversation: "Conversation", question: str, patience: float) -> None:
    """Write the answer as it comes. Raises what `Client.chat` raises, and KeyboardInterrupt."""
    last = ""
    try:
        with closing(_pieces(conversation, question, patience)) as pieces:
            for last in pieces:
                sys.stdout.write(last)
                sys.stdout.flush()
    except KeyboardInterrupt:
        last = last or "^C"
        raise
    finally:
        if last and not last.endswith("\n"):
            print(flush=True)


def _once(conversation: "Conversation", question: str) -> None:
    from pxd.cli.client import Refused, StreamFailed, Unreachable

    patience = math.inf if sys.stderr.isatty() else PATIENCE_S
    try:
        _say(conversation, question, patience)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except (Refused, StreamFailed, Unreachable) as error:
        fail(str(error))
    if sys.stdout.isatty():
        _show_summary(conversation.summary)


def _show_summary(summary: "Summary") -> None:
    from rich.console import Console

    parts = [f"{summary.tokens} token" + ("" if summary.tokens == 1 else "s")]
    if summary.rate:
        parts.append(f"{summary.rate:.1f} tokens/s")
    parts.append(f"first after {1000 * summary.until_first:.0f} ms")
    if summary.finish == "length":
        parts.append("cut at the length limit")
    Console(highlight=False).print(" · ".join(parts), style="bright_black")


def _prompt() -> str:
    """Colour only where the line editor can be told that it takes no room."""
    try:
        import readline
    except ImportError:
        return "> "
    if "libedit" in (readline.__doc__ or ""):
        return "> "
    return "\001\033[1;36m\002> \001\033[0m\002"


def _greet(conversation: "Conversation") -> None:
    from rich.console import Console
    from rich.text import Text

    from pxd.cli.overview import overview

    view = overview(conversation.client.status())
    served = ", ".join(f"{model.name} ({model.state})" for model in view.models) or "no model yet"
    console = Console(highlight=False)
    console.print(
        Text().append("pxd ", "bold cyan").append(served, "bold").append(f" at {view.name}")
    )
    console.print("Ctrl-C stops an answer, Ctrl-D leaves, /new starts over.", style="bright_black")


def converse(conversation: "Conversation") -> None:
    """Ask and answer until the end of the input."""
    from rich.console import Console

    from pxd.cli.client import Refused, StreamFailed, Unreachable

    try:
        _greet(conversation)
    except (Refused, Unreachable) as error:
        fail(str(error))
    console = Console(highlight=False, markup=False)
    prompt = _prompt()
    while True:
        try:
            question = input(f"\n{prompt}").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            console.print("\n(Ctrl-D leaves)", style="bright_black")
            continue
        if question == "/new":
            conversation.forget()
            console.print("a new conversation", style="bright_black")
        elif question:
            try:
                _say(conversation, question, math.inf)
                _show_summary(conversation.summary)
            except KeyboardInterrupt:
                console.print("(stopped)", style="bright_black")
            except (Refused, StreamFailed, Unreachable) as error:
                console.print(str(error), style="red")
