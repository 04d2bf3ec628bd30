"""Health, readiness, the cluster's status, and the control routes."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pxd.api.body import read_json_body
from pxd.api.control import require_control
from pxd.api.daemon import Daemon
from pxd.api.door import parse_body
from pxd.api.errors import SERVER, ApiError, json_response
from pxd.serving.status import Leaving

RETRY_AFTER_S = 5


class LeaveBody(msgspec.Struct, forbid_unknown_fields=True):
    now: bool = False


class Cluster:
    """The endpoints."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def healthz(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """200 when some model is served and this node stays; else 503 and why not."""
        status = self._daemon.status()
        models = status.models
        if any(node.leaving for node in status.nodes if node.id == status.self_id):
            return _not_ready("this node is leaving the cluster")
        if any(model.state == "serving" for model in models):
            return json_response({"status": "ready"})
        reasons = [
            f"{model.name} is {model.state}" + (f": {model.reason}" if model.reason else "")
            for model in models
        ]
        planned = status.epoch is not None
        nothing = "no model is chosen to be served" if planned else "the cluster has no plan yet"
        return _not_ready("; ".join(reasons) or nothing)

    async def status(self, _: Request) -> Response:
        return json_response(self._daemon.status(), headers={"cache-control": "no-store"})

    async def planning(self, _: Request) -> Response:
        """The inputs of a plan as they are now, for `pxd plan`."""
        planning = self._daemon.planning()
        if planning is None:
            raise ApiError(
                503,
                "there is no plan yet; the cluster is still being formed",
                type=SERVER,
                code="no_plan",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        return json_response(planning, headers={"cache-control": "no-store"})

    async def doctor(self, request: Request) -> Response:
        # It makes this node and others work, so it is not for everybody who may look.
        require_control(request, self._daemon.control_token)
        return json_response(await self._daemon.doctor(), headers={"cache-control": "no-store"})

    async def ticket(self, request: Request) -> Response:
        require_control(request, self._daemon.control_token)
        return json_response(
            {"ticket": self._daemon.ticket()}, headers={"cache-control": "no-store"}
        )

    async def stop(self, request: Request) -> Response:
        require_control(request, self._daemon.control_token)
        body = parse_body(await read_json_body(request) or b"{}", LeaveBody)
        return json_response(Leaving(self._daemon.stop(now=body.now)), 202)


def _not_ready(reason: str) -> Response:
    content = {"status": "not ready", "reason": reason}
    return json_response(content, 503, {"retry-after": str(RETRY_AFTER_S)})
