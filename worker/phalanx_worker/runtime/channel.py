"""Messages between runner, warm process and guardians: one JSON object per datagram, file descriptors beside it.

Owns the framing on SEQPACKET sockets. Knows no message.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

_MAX_BYTES = 64 * 1024
_MAX_FDS = 8


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    socket.send_fds(connection, [json.dumps(message).encode()], list(fds), socket.MSG_NOSIGNAL)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and its descriptors (not inheritable); None when the peer is gone."""
    try:
        data, fds, _, _ = socket.recv_fds(connection, _MAX_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError:
        return None
    return (json.loads(data), list(fds)) if data else None


def parse(data: bytes) -> dict[str, Any]:
    return json.loads(data)
