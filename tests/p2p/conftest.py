from pathlib import Path

import pytest
import trio

from tests.p2p.nodes import Nodes


@pytest.fixture
async def nodes(nursery: trio.Nursery, tmp_path: Path) -> Nodes:
    return Nodes(nursery, tmp_path)
