"""The checkpoint that a stage is to be loaded from."""

from pathlib import Path

from pxd.executors.protocol import ExecutorError, LoadSpec
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError


def read_checkpoint(spec: LoadSpec) -> Checkpoint:
    """What the files say. Raises `ExecutorError` where they are not what is to be loaded."""
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
    absent = sorted(set(checkpoint.files_for(spec.start, spec.end)) & set(checkpoint.missing))
    if absent:
        raise ExecutorError(
            f"{spec.path} lacks {', '.join(absent)}, which its index names; fetch the model again"
        )
    return checkpoint
