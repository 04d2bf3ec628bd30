"""Reading a request's body within bounds of size and time."""

import trio
from starlette.requests import ClientDisconnect, Request

from pxd.api.errors import ApiError

MAX_BODY = 16 << 20
BODY_TIMEOUT_S = 60.0


def _too_large() -> ApiError:
    message = f"The request body is larger than {MAX_BODY >> 20} MiB"
    return ApiError(413, message, code="request_too_large")


def _check_headers(request: Request) -> None:
    # A browser sends JSON to another site only after asking first, and pxd never agrees: so a page
    # cannot make this cluster compute. The types of forms and plain text need no asking; without
    # an Origin it is no page but somebody with curl, who need not name the type.
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json" and "origin" in request.headers:
        raise ApiError(
            415,
            "Send the body as JSON, with the header `Content-Type: application/json`",
            code="unsupported_media_type",
        )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise _too_large()


async def read_json_body(request: Request) -> bytes:
    """The raw JSON body, at most `MAX_BODY` bytes.

    Raises `ApiError` (408, 413, 415), and `ClientDisconnect` when the client leaves.
    """
    _check_headers(request)
    try:
        with trio.fail_after(BODY_TIMEOUT_S):
            return await _read(request)
    except trio.TooSlowError:
        message = f"The request body did not arrive within {BODY_TIMEOUT_S:g} s"
        raise ApiError(408, message, code="request_timeout") from None


async def _read(request: Request) -> bytes:
    body = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk = message.get("body", b"")
        if len(body) + len(chunk) > MAX_BODY:
            raise _too_large()
        body += chunk
        if not message.get("more_body", False):
            return bytes(body)
