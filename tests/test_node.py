"""The wiring, as far as it can be seen without a cluster."""

from pathlib import Path

import pytest

from pxd import identity
from pxd.cluster.records import Device
from pxd.node import Node
from pxd.selfhood import identify
from pxd.settings import Settings


async def test_a_disk_that_cannot_be_written_to_is_a_problem_of_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(data_dir=tmp_path, name="anna", mdns=False)
    node = Node(settings, identify(settings), Device(executors=("mlx",)))
    node._on_problem("audit", "plan 1.1@x: it makes less of its objective")
    write = identity.write_state

    def full(path: Path, state: identity.State) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(identity, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        await node._persist(1, 5)
    problem = f"objective; cannot write to {tmp_path}: No space left on device"
    assert node.gossip.record.problem.endswith(problem)
    monkeypatch.setattr(identity, "write_state", write)
    await node._persist(1, 5)
    assert node.gossip.record.problem == "plan 1.1@x: it makes less of its objective"
    assert identity.read_state(settings.files.state).term == 5
