"""Opening the two listening ports: libp2p's, and beside it the one for data channels."""

import logging
import socket

import trio

from pxd.settings import parse_endpoint

log = logging.getLogger("pxd.p2p")


def endpoint(wanted: str | None, default: str) -> tuple[str, int]:
    """The wanted HOST:PORT; else the default, with any free port if that one is taken."""
    if wanted is not None:
        return parse_endpoint(wanted)
    host, port = parse_endpoint(default)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("" if host == "*" else host, port))
        except OSError:
            return host, 0
    return host, port


async def listen(host: str, port: int) -> list[trio.SocketListener]:
    """Listen on every address of `host`, all with one port; 0 takes a free one.

    `*` stands for all addresses, of IPv6 too where there is any. Raises OSError, with a message
    for people, when that is not possible.
    """
    try:
        if host != "*":
            return await _listen(host, port)
        try:
            return await _listen(None, port)
        except OSError:
            return await _listen("0.0.0.0", port)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot listen on {host} port {port}: {error.strerror or error}; "
            "choose another one with --listen HOST:PORT",
        ) from error


async def _listen(host: str | None, port: int) -> list[trio.SocketListener]:
    listeners = list(await trio.open_tcp_listeners(port, host=host))
    if port == 0 and len(listeners) > 1:
        # A name with several addresses got a port for each; settle for that of the first.
        port = listeners[0].socket.getsockname()[1]
        for listener in listeners:
            await listener.aclose()
        listeners = list(await trio.open_tcp_listeners(port, host=host))
    return listeners


async def listen_beside(host: str, port: int) -> list[trio.SocketListener]:
    """Like `listen`, on the port after `port` if that is free, so that firewalls can be set up."""
    if port < 65535:
        try:
            return await listen(host, port + 1)
        except OSError as error:
            log.debug("the port after the listen port is taken: %s", error)
    return await listen(host, 0)
