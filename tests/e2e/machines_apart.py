"""A Phalanx whose parts are on machines of their own: network namespaces that a bridge joins, and that can be cut off.

Owns that network, and the parts on it as processes. Nothing of it is in the host's own network, and what is left of it
goes with the processes in it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import httpx
import phalanx
import psutil
from phalanx_server.store.embedded import EmbeddedPostgres
from phalanx_server.store.engine import driver_dsn

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
PORT = 8321
GCS_PORT = 6379
COOKIE = "PHALANX_PARTITION_COOKIE"
PHALANX = [sys.executable, "-m", "phalanx"]
RAY = str(Path(sys.executable).with_name("ray"))

START_S = 120.0
PATIENCE_S = 90.0
FENCE_S = 8.0
GRACE_S = 3.0  # that the server waits after the fence

SERVER_SETTINGS = {
    "PHALANX_FENCE_S": str(FENCE_S),
    "PHALANX_LOSS_GRACE_S": str(GRACE_S),
    "PHALANX_STARTUP_GRACE_S": "5",
}
RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_report_resources_period_milliseconds": "20",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "GLOO_SOCKET_IFNAME": "eth0",
}


def missing() -> str:
    """What this machine lacks for network namespaces; "" if nothing."""
    lacking = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if lacking:
        return f"needs {', '.join(lacking)} (iproute2, util-linux)"
    tried = subprocess.run(["unshare", "-n", "ip", "link", "add", "type", "bridge"], capture_output=True, text=True)
    return f"needs root and network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


class Network:
    """Machines on one bridge; each is a network namespace that lives as long as the process that holds it."""

    def __init__(self) -> None:
        self._holders: dict[str, subprocess.Popen[str]] = {}
        self.address: dict[str, str] = {}
        self._hold("switch")
        self._ip("switch", "link add bridge type bridge")
        self._ip("switch", "link set bridge up")

    def add(self, name: str) -> None:
        """A machine with an address of its own."""
        self.address[name] = f"10.77.0.{len(self.address) + 1}"
        self._hold(name)
        self._ip("switch", f"link add {name} type veth peer name eth0 netns {self._holders[name].pid}")
        self._ip("switch", f"link set {name} master bridge up")
        self._ip(name, f"addr add {self.address[name]}/24 dev eth0")
        self._ip(name, "link set eth0 up")

    @contextmanager
    def cut_off(self, name: str) -> Iterator[float]:
        """Its cable is pulled out, at the time that this yields; in again at the end."""
        self._ip("switch", f"link set {name} down")
        try:
            yield time.time()
        finally:
            self._ip("switch", f"link set {name} up")

    @contextmanager
    def cut_off_from(self, name: str, other: str) -> Iterator[float]:
        """One machine does not find the way to another."""
        self._ip(name, f"route add blackhole {self.address[other]}/32")
        try:
            yield time.time()
        finally:
            self._ip(name, f"route del blackhole {self.address[other]}/32")

    def on(self, name: str) -> list[str]:
        """The beginning of a command line that runs the rest on that machine."""
        return ["nsenter", f"--net=/proc/{self._holders[name].pid}/ns/net"]

    @contextmanager
    def standing_on(self, name: str) -> Iterator[None]:
        """This thread, and what it starts, has the network of that machine."""
        with open("/proc/thread-self/ns/net") as home, open(f"/proc/{self._holders[name].pid}/ns/net") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def close(self) -> None:
        for holder in self._holders.values():
            holder.kill()
            holder.communicate()

    def _hold(self, name: str) -> None:
        """It ends with this process: its standard input does."""
        holder = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._holders[name] = holder
        assert holder.stdout is not None and holder.stdout.readline() == "up\n"

    def _ip(self, name: str, arguments: str) -> None:
        subprocess.run([*self.on(name), "ip", *arguments.split()], check=True)


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def wait_for(what: Callable[[], T | None], why: str, timeout_s: float = PATIENCE_S) -> T:
    """What it returns, as soon as that is something."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        with suppress(phalanx.errors.ConnectionFailed, phalanx.errors.Unavailable):
            if found := what():
                return found
        assert time.monotonic() < deadline_s, f"{why}: not within {timeout_s:g} s"
        time.sleep(0.2)


@dataclass
class Site:
    """PostgreSQL, server and scheduler on one machine, Ray's head and the agent on another, and nodes of one GPU."""

    data: Path
    network: Network
    nodes: int
    cookie: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.postgres = EmbeddedPostgres(self.data / "postgres")

    def start(self) -> None:
        for name in ("nodes", "checkpoints", "logs", "storage"):
            (self.data / name).mkdir()
        (self.data / "ray-token").write_text(uuid.uuid4().hex)
        (self.data / "ray-token").chmod(0o600)
        self.network.add("control")
        self.network.add("head")
        self._start_ray("head", "--head", f"--port={GCS_PORT}", "--include-dashboard=false", "--num-cpus=0")
        self._start_server(self.postgres.start())
        self.client = phalanx.Client(self.url, (self.data / "admin-token").read_text().strip())
        self._start_agent()
        for index in range(self.nodes):
            self._start_node(f"node-{index}")
        wait_for(self._is_warm, "torch on every node", START_S)

    @property
    def url(self) -> str:
        return f"http://{self.network.address['control']}:{PORT}"

    @property
    def gcs(self) -> str:
        return f"{self.network.address['head']}:{GCS_PORT}"

    def _start_server(self, database: str) -> None:
        env = {**SERVER_SETTINGS, "PHALANX_DATABASE_URL": database}
        env["PHALANX_STORAGE_URL"] = (self.data / "storage").as_uri()
        for role in ("admin", "cluster"):
            made = subprocess.run([*PHALANX, "new-token"], capture_output=True, text=True, check=True)
            (self.data / f"{role}-token").write_text(made.stdout)
            env[f"PHALANX_BOOTSTRAP_{role.upper()}_TOKEN_FILE"] = str(self.data / f"{role}-token")
        host = self.network.address["control"]
        self._run("control", "server", *PHALANX, "server", "--migrate", "--host", host, "--port", str(PORT), env=env)
        wait_for(self._is_ready, "the server", START_S)
        self._run("control", "scheduler", *PHALANX, "scheduler", env=env)

    def _start_agent(self) -> None:
        agent = ["--server", self.url, "--token-file", str(self.data / "cluster-token"), "--ray-address", self.gcs]
        agent += ["--data", str(self.data / "nodes"), "--checkpoint-root", str(self.data / "checkpoints")]
        wait_for(self._has_head, "Ray's head", START_S)
        self._run("head", "agent", *PHALANX, "agent", *agent, "--shared-checkpoints", env=self._ray_env("head"))

    def _start_node(self, name: str) -> None:
        """One after another: several `ray start` at once get in each other's way, separate networks or not."""
        self.network.add(name)
        labels = f"--labels=phalanx.io/node-name={name},phalanx.io/gpu-type=emulated"
        self._start_ray(name, f"--address={self.gcs}", "--num-cpus=2", "--num-gpus=1", labels)
        wait_for(lambda: name in {node.name for node in self.client.nodes()}, name, START_S)

    def _start_ray(self, name: str, *arguments: str) -> None:
        """Whoever runs a machine starts its Ray again when it has ended."""
        ray = [RAY, "start", "--block", f"--node-ip-address={self.network.address[name]}"]
        ray += ["--object-store-memory=80000000", "--include-log-monitor=false", *arguments]
        again = ["sh", "-c", 'while :; do "$@"; sleep 1; done', "sh", *ray]
        self._run(name, f"ray-{name}", *again, env=self._ray_env(name))

    def _ray_env(self, name: str) -> dict[str, str]:
        """Each machine has its own /tmp, as it were."""
        directory = self.data / name
        directory.mkdir(exist_ok=True)
        return {**RAY_SETTINGS, "RAY_AUTH_TOKEN_PATH": str(self.data / "ray-token"), "RAY_TMPDIR": str(directory)}

    def _run(self, machine: str, log: str, *command: str, env: dict[str, str]) -> None:
        with (self.data / "logs" / f"{log}.log").open("ab") as out:
            subprocess.Popen(
                [*self.network.on(machine), *command],
                env={**os.environ, **env, COOKIE: self.cookie},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def query(self, sql: str) -> list[Any]:
        """Rows of the database, past the server."""

        async def fetch() -> list[Any]:
            connection = await asyncpg.connect(driver_dsn(self.postgres.url()))
            try:
                return await connection.fetch(sql)
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        return False

    def _has_head(self) -> bool:
        with suppress(OSError), socket.create_connection((self.network.address["head"], GCS_PORT), timeout=2):
            return True
        return False

    def _is_warm(self) -> bool:
        return sum(node.warm_ready for node in self.client.nodes()) == self.nodes

    def stop(self) -> None:
        """End all that it started, whatever state that is in."""
        while left := self._processes():
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=5)
        self.postgres.stop()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(COOKIE) == self.cookie and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found
