"""The house rules of the design, enforced: who may import whom, and what stays out of where."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "pxd"
MODULES = sorted(PACKAGE.rglob("*.py"))

MAX_LINES = 500

FLOORS = {
    "__init__": 0,
    "wire": 0,
    "settings": 0,
    "identity": 0,
    "hardware": 0,
    "lean": 0,
    "notify": 0,
    "signals": 0,
    "cluster": 1,
    "planning": 1,
    "engine": 1,
    "executors": 2,
    "models": 2,
    "p2p": 2,
    "serving": 3,
    "doctor": 3,
    "selfhood": 3,
    "node": 4,
    "api": 5,
    "cli": 5,
    "__main__": 6,
}
"""Imports run downwards: a module may import from its own floor and from those below."""

PURE_ROOMS = {"cluster", "planning", "engine"}
PURE_THIRD_PARTY = {"msgspec", "numpy"}
IMPURE_STDLIB = {
    "asyncio",
    "concurrent",
    "datetime",
    "multiprocessing",
    "os",
    "random",
    "secrets",
    "selectors",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "urllib",
    "uuid",
}
TENSOR_LIBRARIES = {"mlx", "mlx_lm", "torch", "sglang"}


def imported(source: str, module: str) -> Iterator[str]:
    """Full names of everything a module imports, wherever in it and under whatever condition."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            # `from pxd import node` names the module `pxd.node`.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def may_import(importer: str, target: str) -> bool:
    """Whether the rule of floors lets one pxd room import another one."""
    if target not in FLOORS:
        # A name from the package itself, such as `pxd.__version__`.
        target = "__init__"
    if importer == "node":
        # The wiring is the only file that knows everybody; the command line starts it.
        return target not in ("cli", "__main__")
    return FLOORS[target] <= FLOORS[importer]


def violations(source: str, module: str) -> list[str]:
    """What a module with this source does against the rules of the house."""
    here = room(module)
    if here not in FLOORS:
        return [f"{module}: the design has no room `{here}`"]
    found = []
    for name in imported(source, module):
        top = name.split(".")[0]
        if top == "pxd":
            if not may_import(here, room(name)):
                found.append(f"{module} imports {name}, which lies above it")
        elif top in TENSOR_LIBRARIES and here != "executors":
            found.append(f"{module} imports {name}, a tensor library, outside executors/")
        elif here in PURE_ROOMS and not is_pure(top):
            found.append(f"{module} is in a pure room and imports {name}")
    lines = source.count("\n")
    if lines >= MAX_LINES:
        found.append(f"{module} has {lines} lines; at most {MAX_LINES - 1} are allowed")
    return found


def is_pure(top: str) -> bool:
    in_stdlib = top in sys.stdlib_module_names and top not in IMPURE_STDLIB
    return in_stdlib or top in PURE_THIRD_PARTY


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_the_package_is_found() -> None:
    assert {"pxd.wire", "pxd.cluster", "pxd.cluster.records"} <= {module_name(p) for p in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_house_rules(path: Path) -> None:
    assert violations(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pxd.planning.x", "from pxd.p2p import network"),
        ("pxd.cluster.x", "import pxd.executors.protocol"),
        ("pxd.wire", "from pxd.cluster.records import Device"),
        ("pxd.serving.x", "from pxd import node"),
        ("pxd.serving.x", "from ..api import daemon"),
        ("pxd.api.x", "import mlx.core as mx"),
        ("pxd.models.x", "def f():\n    from mlx_lm import load"),
        ("pxd.engine.x", "if TYPE_CHECKING:\n    import trio"),
        ("pxd.engine.x", "import time"),
        ("pxd.cluster.x", "from random import Random"),
        ("pxd.planning.x", "import numpy\nimport httpx"),
        ("pxd.node", "import pxd.cli.main"),
        ("pxd.attic.x", ""),
        ("pxd.wire", "\n" * MAX_LINES),
    ],
)
def test_a_breach_is_found(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pxd.cluster.x", "import math\nimport msgspec\nfrom pxd.wire import Count"),
        ("pxd.engine.x", "import numpy as np\nfrom pxd.cluster.plans import Plan"),
        ("pxd.p2p.x", "import trio, libp2p\nfrom pxd.cluster.membership import Membership"),
        ("pxd.executors.mlx.x", "import mlx.core as mx\nfrom pxd import wire"),
        ("pxd.hardware", "from pxd import __version__\nimport time"),
        ("pxd.node", "from pxd.api import server\nfrom pxd.serving import head"),
        ("pxd.cli.x", "from pxd.node import Node\nfrom pxd.api.daemon import Daemon"),
    ],
)
def test_what_the_rules_allow(module: str, source: str) -> None:
    assert violations(source, module) == []
