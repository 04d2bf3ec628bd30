"""Telling systemd how far start and stop are; see sd_notify(3)."""

import os
import socket


def notify(state: str) -> bool:
    """Send `state`, for example ``READY=1``; False where no service manager listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address or address[0] not in "@/":
        return False
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.connect(address)
        channel.sendall(state.encode())
    return True
