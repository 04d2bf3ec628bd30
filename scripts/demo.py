"""A three-node pxd cluster on loopback, the bundled model split over all of it, one answer.

The model would fit on any one node, so each is limited to 3 of its 8 layers: it takes all three.
Run it with scripts/demo, which makes the environment first.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

NAMES = ("anna", "ben", "carl")
QUESTION = "What is 17 + 25?"
EXPECTED = "42"
LONG_QUESTION = "Count from 1 to 20."
START_TIMEOUT_S = 120.0
MAX_LAYERS = 3

console = Console(highlight=False)


class DemoError(Exception):
    """The demo cannot go on; the message says why."""


class DemoNode:
    """One `pxd start` process with a data directory of its own."""

    def __init__(self, name: str, root: Path, join: str | None, options: list[str]) -> None:
        self.name = name
        self.data_dir = root / name
        self.log = root / f"{name}.log"
        command = [sys.executable, "-m", "pxd", "start", "--name", name, "--no-mdns"]
        command += ["--data-dir", str(self.data_dir), "--model", "demo"]
        # The fastest with a model as small as this.
        command += ["--max-layers", str(MAX_LAYERS), "--executor", "mlx"]
        command += ["--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", *options]
        # A ticket holds the cluster key, and a command line is visible to every user.
        environment = {**os.environ, "PXD_JOIN": join} if join else dict(os.environ)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment
            )

    def url(self) -> str | None:
        """The node's API address, once it has written it down."""
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise DemoError(f"{self.name} ended with code {self.process.returncode}:\n{tail}")
        try:
            found: str = json.loads((self.data_dir / "daemon.json").read_text())["http"]
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    def pxd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a pxd command against this node."""
        command = [sys.executable, "-m", "pxd", *arguments, "--data-dir", str(self.data_dir)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def stop_all(nodes: list[DemoNode]) -> None:
    """At once: none of them has to take over from another."""
    for node in nodes:
        node.leave()
    for node in nodes:
        node.end()


def wait_for_url(node: DemoNode) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if url := node.url():
            return url
        time.sleep(0.1)
    raise DemoError(f"{node.name} did not start within {START_TIMEOUT_S:g} s; see {node.log}")


def progress_line(status: dict[str, Any]) -> str:
    alive = sum(node["state"] == "alive" for node in status["nodes"])
    models = [f"{m['name']} {m['state']}" for m in status["models"]] or ["no plan yet"]
    reasons = [m["reason"] for m in status["models"] if m["reason"]]
    return f"{alive} of {len(NAMES)} nodes see each other; " + ", ".join(models + reasons)


def wait_for_split(nodes: list[DemoNode], urls: list[str]) -> list[dict[str, Any]]:
    """Wait until every node says that the model is served by all three nodes together.

    Returns their statuses, in order.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    line = ""
    with console.status("forming the cluster") as spinner:
        while time.monotonic() < deadline:
            for node in nodes:
                node.url()
            statuses = [httpx.get(f"{url}/cluster/status").json() for url in urls]
            if all(is_split(status) for status in statuses):
                return statuses
            if (now := progress_line(statuses[0])) != line:
                line = now
                spinner.update(line)
                if not console.is_terminal:
                    console.print(f"    {line}")
            time.sleep(0.2)
    raise DemoError(f"the cluster was not ready within {START_TIMEOUT_S:g} s: {line}")


def is_split(status: dict[str, Any]) -> bool:
    for model in status["models"]:
        for pipeline in model["pipelines"]:
            nodes = {stage["node"] for stage in pipeline}
            if model["state"] == "serving" and len(nodes) == len(NAMES):
                return True
    return False


def ask(url: str, question: str) -> str:
    """Ask as any OpenAI client would, show the answer as it streams, and return it."""
    body = {
        "model": "demo",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer, tokens, first, began = "", 0, 0.0, time.monotonic()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
        if response.status_code != 200:
            raise DemoError(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise DemoError(f"the answer broke off: {chunk['error']['message']}")
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                text = choice["delta"].get("content") or ""
                first = first or (time.monotonic() if text else 0.0)
                answer += text
                console.print(text, end="", style="bold green")
    ended = time.monotonic()
    rate = f"{tokens / (ended - began):.1f} tokens/s" if tokens else "no tokens"
    console.print(
        f"\n[dim]{tokens} tokens, first after {1000 * (first - began):.0f} ms, {rate}[/dim]"
    )
    return answer


def run(arguments: argparse.Namespace, stack: ExitStack) -> int:
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pxd-demo-")))
    nodes: list[DemoNode] = []
    stack.callback(stop_all, nodes)

    def start(name: str, join: str | None) -> str:
        console.print(f"[bold]==>[/bold] starting node [cyan]{name}[/cyan]")
        node = DemoNode(name, root, join, arguments.option)
        nodes.append(node)
        return wait_for_url(node)

    urls = [start(NAMES[0], None)]
    ticket = nodes[0].pxd("ticket").stdout.strip()
    urls += [start(name, ticket) for name in NAMES[1:]]
    console.print(
        "[bold]==>[/bold] splitting the bundled model over all three (it would fit on any one; "
        f"--max-layers {MAX_LAYERS} makes it need them all)",
        soft_wrap=True,
    )
    statuses = wait_for_split(nodes, urls)
    head = statuses[0]["models"][0]["pipelines"][0][0]["node"]
    asked = next(index for index, status in enumerate(statuses) if status["self"] != head)
    console.print(
        f"[bold]==>[/bold] asking [cyan]{nodes[asked].name}[/cyan], which does not hold the head: "
        f"[bold]{QUESTION}[/bold]\n"
    )
    answer = ask(urls[asked], QUESTION)
    console.print(f"\n[bold]==>[/bold] and something longer: [bold]{LONG_QUESTION}[/bold]\n")
    ask(urls[asked], LONG_QUESTION)
    console.print(f"\n[bold]==>[/bold] pxd status, as {nodes[asked].name} sees it\n")
    subprocess.run(
        [sys.executable, "-m", "pxd", "status", "--data-dir", str(nodes[asked].data_dir)],
        check=True,
        timeout=60,
    )
    right = answer.strip() == EXPECTED
    if not right:
        console.print(f"[red]the answer should have been {EXPECTED!r}, not {answer!r}[/red]")
    if not arguments.once:
        stay(nodes, urls, asked)
    return 0 if right else 1


def stay(nodes: list[DemoNode], urls: list[str], asked: int) -> None:
    pxd = Path(sys.executable).parent / "pxd"
    console.print("\nThe cluster stays up until Ctrl-C. Try, in another terminal:")
    console.print(f"  {pxd} chat --node {urls[asked]}", soft_wrap=True)
    console.print(f"  {pxd} status --node {urls[0]} --watch", soft_wrap=True)
    while all(node.process.poll() is None for node in nodes):
        time.sleep(0.5)
    raise DemoError("a node has ended; stopping the others")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument(
        "--once", action="store_true", help="stop after the answer; exit 0 if it is right"
    )
    parser.add_argument("option", nargs="*", help="further options for every `pxd start`, after --")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    # Whoever ends the demo, however: the nodes go with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        try:
            return run(arguments, stack)
        except KeyboardInterrupt:
            console.print("\n[bold]==>[/bold] stopping the nodes")
            return 0 if not arguments.once else 130
        except (DemoError, httpx.HTTPError, subprocess.SubprocessError) as error:
            console.print(f"[red]{error}[/red]", markup=True)
            return 1


if __name__ == "__main__":
    sys.exit(main())
