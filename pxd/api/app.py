"""The HTTP API: which route is answered by what."""

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import Route

from pxd.api.chat import ChatCompletions
from pxd.api.cluster import Cluster
from pxd.api.daemon import Daemon
from pxd.api.door import DoorRoutes
from pxd.api.errors import HANDLERS, Boundary
from pxd.api.models import Models
from pxd.api.operations import OperationRoutes


def create_app(daemon: Daemon) -> Starlette:
    chat, models, cluster = ChatCompletions(daemon), Models(daemon), Cluster(daemon)
    door, operations = DoorRoutes(daemon), OperationRoutes(daemon)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", chat.__call__, methods=["POST"]),
            Route("/v1/models", models.list),
            Route("/v1/models/{id:path}", models.get),
            Route("/healthz", cluster.healthz),
            Route("/readyz", cluster.readyz),
            Route("/cluster/status", cluster.status),
            Route("/cluster/planning", cluster.planning),
            Route("/cluster/doctor", cluster.doctor),
            Route("/cluster/ticket", cluster.ticket),
            Route("/cluster/stop", cluster.stop, methods=["POST"]),
            Route("/cluster/key/rotate", door.rotate, methods=["POST"]),
            Route("/cluster/kick", door.kick, methods=["POST"]),
            Route("/cluster/pardon", door.pardon, methods=["POST"]),
            Route("/cluster/bans", door.bans),
            Route("/cluster/drain", operations.drain, methods=["POST"]),
            Route("/cluster/resume", operations.resume, methods=["POST"]),
            Route("/cluster/models/use", operations.use, methods=["POST"]),
            Route("/cluster/models/stop", operations.stop, methods=["POST"]),
            Route("/cluster/models/add", operations.add, methods=["POST"]),
            Route("/cluster/models/remove", operations.remove, methods=["POST"]),
        ],
        middleware=[Middleware(Boundary)],
        exception_handlers=HANDLERS,
    )
    app.router.redirect_slashes = False
    return app
