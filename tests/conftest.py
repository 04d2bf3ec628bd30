"""For all tests."""

import os

from hypothesis import HealthCheck, settings

# Tests share the cores: PyTorch's threads would wait for each other for longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How fast a machine draws examples says nothing about pxd.
settings.register_profile("pxd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pxd")
