import pytest

from pxd.executors.choice import installed_kinds


@pytest.fixture(scope="session", params=installed_kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return request.param
