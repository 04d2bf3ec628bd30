"""Runs a command in a network of its own, whose one interface ends in somebody else's hands.

    python -m scripts.benchmarks.inside SOCKET ADDRESS COMMAND...

Makes a network namespace with a TUN interface of that address in a /24, sends its descriptor over
the Unix socket with the number SOCKET, and becomes the command. Nothing outlives the command. Where
the kernel lets users have namespaces, it needs no root.
"""

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000

SIOCGIFFLAGS = 0x8913
SIOCSIFFLAGS = 0x8914
SIOCSIFADDR = 0x8916
SIOCSIFNETMASK = 0x891C
SIOCSIFMTU = 0x8922
IFF_UP = 0x1

INTERFACE = b"eth0"
MTU = 65000
"""As large as loopback's, so that few packets carry an activation."""


def leave() -> None:
    """Move this process into namespaces of its own. Raises OSError where that is not allowed."""
    user, group = os.geteuid(), os.getegid()
    wanted = CLONE_NEWNET if user == 0 else CLONE_NEWNET | CLONE_NEWUSER
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(wanted):
        raise OSError(ctypes.get_errno(), "the kernel gives no network namespace")
    if user != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def open_interface(address: str) -> int:
    """Make the interface and bring it up, loopback, too; returns the other end."""
    other_end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(other_end, TUNSETIFF, struct.pack("16sH22x", INTERFACE, IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFADDR, _request(INTERFACE, _internet(address)))
        fcntl.ioctl(control, SIOCSIFNETMASK, _request(INTERFACE, _internet("255.255.255.0")))
        fcntl.ioctl(control, SIOCSIFMTU, _request(INTERFACE, struct.pack("i", MTU)))
        for name in (b"lo", INTERFACE):
            answer = fcntl.ioctl(control, SIOCGIFFLAGS, _request(name, b""))
            (flags,) = struct.unpack_from("h", answer, 16)
            fcntl.ioctl(control, SIOCSIFFLAGS, _request(name, struct.pack("h", flags | IFF_UP)))
    return other_end


def _request(name: bytes, value: bytes) -> bytes:
    """A `struct ifreq`."""
    return struct.pack("16s24s", name, value)


def _internet(address: str) -> bytes:
    """A `struct sockaddr_in`."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


def main(arguments: list[str]) -> None:
    descriptor, address, *command = arguments
    leave()
    other_end = open_interface(address)
    with socket.socket(fileno=int(descriptor)) as connection:
        socket.send_fds(connection, [b"."], [other_end])
    os.close(other_end)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(sys.argv[1:])
