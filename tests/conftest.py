"""For all tests."""

import gc
import os

import pytest
from hypothesis import HealthCheck, settings

# Tests share the cores: PyTorch's threads would wait for each other for longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast a machine draws examples says nothing about pxd.
settings.register_profile("pxd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pxd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: who gets such a file last keeps all others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def nothing_old_is_garbage() -> None:
    """Engines collect garbage at every load: spare them all that tests and libraries hold."""
    gc.collect()
    gc.freeze()
