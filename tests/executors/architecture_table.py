"""Makes the table of what mlx-lm's architectures can do in pxd, by trying each of them.

    python -m tests.executors.architecture_table [ARCHITECTURE …]

With names only their rows are made anew. Every architecture is tried in a process of its own, for
the reason given in `tests.tiny_models`.
"""

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import msgspec

from tests.tiny_configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "pxd" / "executors" / "mlx" / "ARCHITECTURES.md"
TIMEOUT_S = 900
REASON_CHARACTERS = 200

HEADER = """\
# The architectures of mlx-lm {version} in pxd

Made by `scripts/architectures`, which builds a tiny random model of every architecture and cuts it
into one, two and three stages: their logits must be those of mlx-lm's unsplit model bit for bit,
and so must the tokens.

- **Cuts**: where a model may be divided among nodes: before any layer, only before some (named for
  the tiny model), or nowhere, which means that it is served whole.
- **Batches**: requests decode together, each with the tokens it gets alone; without, one after the
  other in each step.
- **Prefixes**: a request can begin with KV that another one has left.
- **Guesses**: several tokens of a request can be tried in one step (speculation).

Other names for some of them: {aliases}.

"""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What was found. `cuts` None: it does not run at all, for `reason`."""

    name: str
    layers: int = 0
    cuts: tuple[int, ...] | None = None
    batches: bool = False
    prefixes: bool = False
    guesses: bool = False
    reason: str = ""

    @property
    def where(self) -> str:
        if self.cuts is None:
            return "does not run"
        if not self.cuts:
            return "nowhere"
        if self.cuts == tuple(range(1, self.layers)):
            return "any layer"
        return f"{', '.join(map(str, self.cuts))} of {self.layers}"

    @property
    def line(self) -> str:
        marks = ["yes" if mark else "-" for mark in (self.batches, self.prefixes, self.guesses)]
        reason = self.reason.replace("|", r"\|")
        return f"| {' | '.join((self.name, self.where, *marks, reason))} |"


def _package() -> Path:
    """Where mlx-lm is; nothing of it is imported."""
    spec = find_spec("mlx_lm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def architectures() -> list[str]:
    """Modules of mlx-lm that have a model."""
    found = []
    for path in (_package() / "models").glob("*.py"):
        names = [node.name for node in ast.parse(path.read_text()).body if _is_class(node)]
        if "Model" in names:
            found.append(path.stem)
    return sorted(found)


def aliases() -> dict[str, str]:
    """Names of models that mlx-lm runs with the code of another one."""
    for node in ast.parse((_package() / "utils.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODEL_REMAPPING":
            found: dict[str, str] = ast.literal_eval(node.value)
            return found
    raise AssertionError("mlx-lm has no MODEL_REMAPPING any more")


def _is_class(node: ast.stmt) -> bool:
    return isinstance(node, ast.ClassDef)


def lines_of(table: str) -> dict[str, str]:
    """Name to the line of each row."""
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:]}


def cells(table: str) -> dict[str, list[str]]:
    """Name to the other columns of each row."""
    return {
        name: [cell.strip() for cell in line.split(" |")[1:-1]]
        for name, line in lines_of(table).items()
    }


def render(lines: Mapping[str, str]) -> str:
    titles = "| Architecture | Cuts | Batches | Prefixes | Guesses | Why not |"
    rows = [lines[name] for name in sorted(lines, key=str.lower)]
    body = "\n".join([titles, "| --- | --- | --- | --- | --- | --- |", *rows])
    others = ", ".join(f"{name} ({code})" for name, code in sorted(aliases().items()))
    return HEADER.format(version=version("mlx-lm"), aliases=others) + body + "\n"


def try_out(name: str) -> Row:
    """Raises `AssertionError` where a model computes something else in stages."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "tests.without_torch"]
        result = subprocess.run(
            [*command, "tests.executors.architecture_check", name, directory, "--row"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert result.returncode == 0, f"{name}: {result.returncode}\n{result.stderr[-3000:]}"
    return msgspec.json.decode(result.stdout.splitlines()[-1], type=Row)


def main(names: Sequence[str]) -> int:
    wanted = list(names) or sorted(set(CONFIGS) & set(architectures()), key=str.lower)
    lines = lines_of(TABLE.read_text()) if names and TABLE.exists() else {}
    failures = []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, future in [(name, pool.submit(try_out, name)) for name in wanted]:
            try:
                lines[name] = future.result().line
                print(lines[name], flush=True)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                failures.append(name)
                print(f"| {name} | FAILED | {error}", flush=True)
    if failures:
        print(f"no table: {', '.join(failures)} failed", file=sys.stderr)
        return 1
    TABLE.write_text(render(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
