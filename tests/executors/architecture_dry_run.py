"""Prints where each architecture of mlx-lm may be cut, found by dry runs of tiny skeletons."""

import json

import msgspec

from pxd.executors.mlx.layers import CannotSplit
from pxd.executors.mlx.skeleton import model_classes
from pxd.executors.mlx.split import plan_split
from pxd.executors.protocol import ExecutorError
from tests.executors.architecture_table import Row, architectures
from tests.tiny_configs import CONFIGS


def where(name: str) -> str:
    config = json.loads(json.dumps(CONFIGS[name]))
    try:
        model_class, args_class = model_classes(config)
        plan = plan_split(model_class(args_class.from_dict(config)))
    except CannotSplit:
        return Row(name=name, cuts=()).where
    except (ExecutorError, RuntimeError):
        # As `pxd.executors.mlx.describe` has it: RuntimeError is MLX without the kernels it wants.
        return Row(name=name).where
    return Row(name=name, layers=plan.layers, cuts=plan.splits).where


def main() -> None:
    print(msgspec.json.encode({name: where(name) for name in architectures()}).decode())


if __name__ == "__main__":
    main()
