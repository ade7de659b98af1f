"""The port that `phalanx up` picks is still its server's when that starts, beside a Ray that takes some."""

import socket

import pytest
from phalanx_server.up_command import reserved_port

HOST = "127.0.0.1"


def test_a_port_that_is_reserved_is_given_to_nobody_but_who_asks_to_share_it() -> None:
    with reserved_port(HOST, 0) as port:
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind((HOST, port))
        for _ in range(2):  # the server, and the server once it was started again
            with socket.create_server((HOST, port)) as server, socket.create_connection((HOST, port)):
                server.accept()[0].close()


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SystemExit, match=f"cannot listen on {HOST}:{port} .*choose another --port"):
            reserved_port(HOST, port).__enter__()
