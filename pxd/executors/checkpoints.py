"""The checkpoint that a stage is to be loaded from."""

from pathlib import Path

from pxd.executors.protocol import ExecutorError, LoadSpec
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError


def read_checkpoint(spec: LoadSpec) -> Checkpoint:
    """Raises `ExecutorError`, also where the directory holds another model than `spec` means."""
    try:
        checkpoint = describe_checkpoint(Path(spec.path))
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    if spec.fingerprint and spec.fingerprint != checkpoint.fingerprint:
        raise ExecutorError(
            f"{spec.path} holds another model than the plan means "
            f"(fingerprint {checkpoint.fingerprint[:12]}, not {spec.fingerprint[:12]}); "
            "put the same model on every node"
        )
    return checkpoint
