from collections.abc import Iterator

import openai
import pytest

from .fakes import LiveServer, live_server


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
