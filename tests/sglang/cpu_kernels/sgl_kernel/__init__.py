"""Stands for SGLang's CUDA kernels where there is no GPU: tests find it before the real ones.

Models that run on a CPU in float32 need none of them: what is called fails.
"""

from collections.abc import Callable
from typing import Any

__version__ = "0"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError(f"there is no kernel {name} without a GPU")

    return missing
