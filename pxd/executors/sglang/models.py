"""SGLang's model code, told from its files: reading them takes milliseconds, and importing all of
them, which SGLang does by itself, half a minute."""

import ast
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pxd.executors.protocol import ExecutorError

DISABLED = "SGLANG_DISABLED_MODEL_ARCHS"
"""SGLang's own setting: names of model modules that it is not to import."""


class ModelCode(NamedTuple):
    """The module that has a model class, and whether that can be one stage of a pipeline."""

    module: str
    staged: bool


def models_directory() -> Path:
    """Raises `ExecutorError`."""
    spec = importlib.util.find_spec("sglang")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(place) / "srt" / "models"
        if directory.is_dir():
            return directory
    raise ExecutorError("SGLang has no srt/models; install it anew")


def find_code(architecture: str, directory: Path) -> ModelCode:
    """Raises `ExecutorError` where no module in `directory` has the class `architecture`."""
    wanted = re.compile(rf"^class {re.escape(architecture)}\b", re.MULTILINE)
    for path in sorted(directory.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        if wanted.search(source):
            return ModelCode(path.stem, _is_staged(architecture, source, directory))
    raise ExecutorError(f"SGLang has no model code for {architecture}")


def only(module: str, directory: Path, environment: dict[str, str] | None = None) -> None:
    """Keep SGLang from importing other models than `module`, unless somebody has decided already.

    To be called before SGLang is imported.
    """
    others = sorted(path.stem for path in directory.glob("*.py") if path.stem != module)
    (os.environ if environment is None else environment).setdefault(DISABLED, ",".join(others))


def architecture_of(config: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """The model class that a config.json means, by name. mlx-lm's configurations may name just the
    kind of model, for which `known` has transformers' class. Raises `ExecutorError`."""
    named = config.get("architectures")
    if isinstance(named, list) and named and isinstance(named[0], str):
        return named[0]
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in known:
        return known[kind]
    raise ExecutorError(f"config.json names no architecture, and none is known for {kind!r}")


MOST_BASES = 16


def _is_staged(name: str, source: str, directory: Path, left: int = MOST_BASES) -> bool:
    """Whether the `forward` of a class, or of one that it derives from, takes hidden states."""
    if not left:
        return False
    tree = ast.parse(source)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    node = classes.get(name)
    if node is None:
        return _is_imported_staged(name, tree, directory, left - 1)
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "forward":
            arguments = (*part.args.args, *part.args.kwonlyargs)
            return any(argument.arg == "pp_proxy_tensors" for argument in arguments)
    return any(_is_staged(base, source, directory, left - 1) for base in _bases(node))


def _bases(node: ast.ClassDef) -> Iterator[str]:
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield base.id


def _is_imported_staged(name: str, tree: ast.Module, directory: Path, left: int) -> bool:
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            path = directory / f"{node.module.rpartition('.')[2]}.py"
            for alias in node.names:
                if (alias.asname or alias.name) == name and path.is_file():
                    return _is_staged(alias.name, path.read_text(encoding="utf-8"), directory, left)
    return False
