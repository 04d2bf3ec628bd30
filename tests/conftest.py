"""For all tests."""

from hypothesis import HealthCheck, settings

# How fast a machine draws examples says nothing about pxd.
settings.register_profile("pxd", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("pxd")
