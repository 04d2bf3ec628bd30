"""Who may control the daemon: programs on its machine that can read its data directory.

They show the token of `daemon.json`, which is this daemon's user's alone and new with every start.
A page in the user's browser also sits on this machine. It does not know the token, could not send
the header to another origin without being allowed to by CORS, which pxd never does; and a page
whose own name was re-pointed at this machine (DNS rebinding) betrays itself by the Host header.
"""

import hmac
import ipaddress

from starlette.requests import Request

from pxd.api.errors import ApiError

CONTROL_HEADER = "X-Pxd-Control"

_PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_here(host: str, listening: str) -> bool:
    """Whether an IP address is loopback, or the very one on which the connection came in."""
    address = _address(host)
    return address is not None and (address.is_loopback or address == _address(listening))


def _host_name(header: str) -> str:
    """The host of a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]


def _is_token(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode(), token.encode())


def require_control(request: Request, token: str) -> None:
    """Raises `ApiError` 403 unless the request may control the daemon with that token."""
    server = request.scope.get("server")
    listening = str(server[0]) if server else ""
    client = request.client.host if request.client else ""
    name = _host_name(request.headers.get("host", "")).lower().rstrip(".")
    forwarded = any(header in request.headers for header in _PROXY_HEADERS)
    if forwarded or not _is_here(client, listening):
        reason = "only programs on the daemon's own machine may do this"
    elif not _is_token(request.headers.get(CONTROL_HEADER, ""), token):
        reason = (
            f"the header `{CONTROL_HEADER}` does not hold the token of daemon.json in the daemon's "
            "data directory; use the pxd command, as the user that runs the daemon"
        )
    elif name != "localhost" and not _is_here(name, listening):
        reason = "the Host header names neither this machine's loopback nor the listening address"
    else:
        return
    raise ApiError(403, f"Refused: {reason}", type="permission_error", code="forbidden")
