"""Chat templates in Python: mlx-lm's own, for models that came without one for Jinja."""

from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from pxd.models.errors import ModelError

Render = Callable[..., str]
"""Takes messages, `add_generation_prompt` and options; raises whatever comes up."""


def python_template(name: Any) -> Render | None:
    """What mlx-lm has for the `chat_template_type` of a tokenizer's configuration; None for none.

    Only the one module is run: mlx-lm as a whole cannot be imported without MLX, which a node that
    takes requests need not have. Raises `ModelError` for a name that mlx-lm does not know.
    """
    if name is None:
        return None
    package = find_spec("mlx_lm")
    if package is None or package.origin is None:
        raise ModelError(f"this model's chat template {name!r} comes with mlx-lm, which is missing")
    directory = Path(package.origin).parent / "chat_templates"
    known = {path.stem: path for path in directory.glob("[!_]*.py")}
    if not isinstance(name, str) or name not in known:
        raise ModelError(f"this model's chat template {name!r} is none of mlx-lm's")
    spec = spec_from_file_location(f"mlx_lm.chat_templates.{name}", known[name])
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    # Some only tell how answers are built, and leave the template to the model.
    render: Render | None = getattr(module, "apply_chat_template", None)
    return render
