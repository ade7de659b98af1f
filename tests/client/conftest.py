"""The client against a fake server: no network, no sleeping, no config of the person who runs the tests."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from phalanx.cli import session
from phalanx.client import AsyncClient, Client

sys.path.insert(0, str(Path(__file__).parent))  # --import-mode=importlib leaves it out
from fake_server import FakeServer

URL, TOKEN = "http://phalanx.test", "phx_token"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Config and state of the CLI under the test's directory; nothing from the environment."""
    for name in ("PHALANX_URL", "PHALANX_TOKEN", "COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def server() -> FakeServer:
    return FakeServer()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    transport = httpx.MockTransport(server.handle)
    with Client(URL, TOKEN, transport=transport, sleep=server.nap, clock=server.clock) as client:
        yield client


@pytest.fixture
async def async_client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    transport = httpx.MockTransport(server.ahandle)
    async with AsyncClient(URL, TOKEN, transport=transport, sleep=server.anap, clock=server.clock) as client:
        yield client


@pytest.fixture
def wired(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    """The fake server as the one that the command line talks to."""

    def make(url: str | None = None, token: str | None = None) -> Client:
        transport = httpx.MockTransport(server.handle)
        return Client(url or URL, token or TOKEN, transport=transport, sleep=server.nap, clock=server.clock)

    def make_async() -> AsyncClient:
        transport = httpx.MockTransport(server.ahandle)
        return AsyncClient(URL, TOKEN, transport=transport, sleep=server.anap, clock=server.clock)

    monkeypatch.setattr(session, "make_client", make)
    monkeypatch.setattr(session, "make_async_client", make_async)
    return server
