"""The `pxd` command. What a command needs beyond its options is imported when it runs."""

import io
import sys
from typing import Annotated

import typer

import pxd
from pxd.cli import chat, doctor, drain, key, kick, models, plan, start, status, stop, ticket
from pxd.cli.options import with_examples
from pxd.lean import without_torch

app = typer.Typer(
    name="pxd",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=with_examples(
        "One model, several machines: every machine runs the same daemon, any of them answers.",
        ("pxd start", "start a node; the first prints how others join"),
        ("pxd start --join TICKET", "start a node in that cluster"),
        ("pxd status", "see the cluster from any of its nodes"),
        ("pxd chat", "talk to the model"),
        ("pxd models use NAME", "serve another model beside those served"),
        ("pxd doctor", "find out what is wrong, and what to do"),
        ("pxd plan", "see how fast the cluster should be, and which machine would help"),
    ),
)


def version() -> None:
    print(f"pxd {pxd.__version__}")


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command("start", help=start.HELP, short_help="Run a node here.")(start.start)
app.command("status", help=status.HELP, short_help="Show the cluster.")(status.status)
app.command("plan", help=plan.HELP, short_help="Plan a model for machines.")(plan.plan)
app.command("chat", help=chat.HELP, short_help="Talk to the model.")(chat.chat)
app.command("doctor", help=doctor.HELP, short_help="Find out what is wrong.")(doctor.doctor)
app.command("ticket", help=ticket.HELP, short_help="Print what others need to join.")(ticket.ticket)
app.add_typer(models.app, name="models", help="The models that the cluster serves.")
app.command("drain", help=drain.HELP, short_help="Take a node out of service.")(drain.drain)
app.command("resume", help=drain.RESUME_HELP, short_help="Undo a drain.")(drain.resume)
app.add_typer(key.app, name="key", help="The cluster's key.")
app.command("kick", help=kick.HELP, short_help="Ban a node from the cluster.")(kick.kick)
app.command("stop", help=stop.HELP, short_help="Stop the node on this machine.")(stop.stop)
app.command("version", help=with_examples("Show the version.", ("pxd version", "")))(version)


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character gets a question mark, not a traceback.
            stream.reconfigure(errors="replace")
    # Also the daemon uses tokenizers alone: models run in processes of their own.
    without_torch()
    app()
