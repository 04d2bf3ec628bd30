"""GET /v1/models: what this cluster serves or is about to serve."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from pxd.api.daemon import Daemon
from pxd.api.errors import json_response
from pxd.serving.requests import UnknownModel


class Models:
    """The endpoints. A model's `created` is when this daemon's API came up: it knows no better."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._created = int(time.time())

    def _entry(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._created, "owned_by": "pxd"}

    def _names(self) -> list[str]:
        models = self._daemon.status().models
        return [model.name for model in models if model.state != "stopping"]

    async def list(self, _: Request) -> Response:
        entries = [self._entry(name) for name in self._names()]
        return json_response({"object": "list", "data": entries})

    async def get(self, request: Request) -> Response:
        name = request.path_params["id"]
        if name not in self._names():
            raise UnknownModel(f"The model {name!r} is not served by this cluster")
        return json_response(self._entry(name))
