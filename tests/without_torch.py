"""Runs a module as if PyTorch were not installed, which an MLX worker does as well.

python -m tests.without_torch MODULE [ARGUMENT …]
"""

import runpy
import sys

from pxd.lean import without_torch

if __name__ == "__main__":
    without_torch()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
