"""Keeps processes small that would import PyTorch and never use it."""

import sys


def without_torch() -> None:
    """As far as this process can see, PyTorch is not installed.

    transformers imports it wherever it is, even for a tokenizer: that takes longer than all the
    rest of a start, and 200 MB.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
