"""Every error a client can see, in OpenAI's shape."""

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from pxd.serving.requests import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
    UnknownModel,
)

log = logging.getLogger("pxd.api")

INVALID = "invalid_request_error"
SERVER = "server_error"
OVERLOADED = "overloaded_error"


class ApiError(Exception):
    """What a client is told: a status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.type, self.param, self.code = type, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        return json_response(self.body(), self.status, self.headers)


def json_response(
    content: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(content), status, headers=headers, media_type="application/json"
    )


def from_request_error(error: RequestError) -> ApiError:
    """How a failure of the services looks to an HTTP client."""
    message = str(error)
    match error:
        case InvalidRequest():
            return ApiError(400, message, param=error.param, code=error.code)
        case UnknownModel():
            return ApiError(404, message, param="model", code="model_not_found")
        case Overloaded():
            headers = _retry_after(error)
            return ApiError(429, message, type=OVERLOADED, code="overloaded", headers=headers)
        case NotReady():
            headers = _retry_after(error)
            return ApiError(503, message, type=SERVER, code="not_ready", headers=headers)
        case DeadlineExceeded():
            # OpenAI's clients would try again at once, for as long as the first time.
            headers = {"x-should-retry": "false"}
            return ApiError(504, message, type=SERVER, code="deadline_exceeded", headers=headers)
        case GenerationFailed():
            return ApiError(502, message, type=SERVER, code="generation_failed")
    return ApiError(500, message, type=SERVER)


def _retry_after(error: NotReady) -> dict[str, str]:
    return {"retry-after": str(max(1, error.retry_after))}


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    where = f"{request.method} {request.url.path}"
    if error.status_code == 404:
        return ApiError(404, f"Unknown request URL: {where}", code="unknown_url")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "").split(", ")
        methods = ", ".join(sorted({*allowed, "OPTIONS"}))
        return ApiError(
            405,
            f"Method not allowed: {where}; this URL takes {methods}",
            code="method_not_allowed",
            headers={"Allow": methods},
        )
    return ApiError(error.status_code, error.detail, headers=error.headers)


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return from_request_error(error).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    shown = _from_http_exception(request, error)
    if shown.status == 405 and request.method == "OPTIONS":
        # Without CORS headers: a browser takes this as a no, any other client as an answer.
        return Response(status_code=204, headers=shown.headers)
    return shown.response()


HANDLERS: dict[Any, ExceptionHandler] = {
    ApiError: _on_api_error,
    RequestError: _on_request_error,
    HTTPException: _on_http_exception,
}


class Boundary:
    """Middleware: an unexpected exception is logged and costs its own request, nothing else.

    After the response has begun, it ends without its terminator, so that the client notices.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = False

        async def tracked(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self.app(scope, receive, tracked)
        except ClientDisconnect:
            log.debug("a client left before its request was complete")
        except Exception:
            log.exception("%s %s failed; this is a bug in pxd", scope["method"], scope["path"])
            if not began:
                message = "Internal error; the daemon's log says more"
                await ApiError(500, message, type=SERVER).response()(scope, receive, send)
