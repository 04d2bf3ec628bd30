from pathlib import Path

import pytest
import trio

from tests.p2p.nodes import Nodes
from tests.p2p.star import Star


@pytest.fixture
async def nodes(nursery: trio.Nursery, tmp_path: Path) -> Nodes:
    return Nodes(nursery, tmp_path)


@pytest.fixture
async def star(nodes: Nodes) -> Star:
    return Star(nodes, await nodes.start(relay=True))
