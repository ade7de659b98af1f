"""`phalanx up`: all of Phalanx on one machine, in one data directory, until Ctrl-C.

Owns the order in which the parts start and stop. The parts are the same commands that one runs one by one in
production: `server`, `scheduler`, `agent`; the database and the Ray cluster are local.
"""

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.markup import escape
from sqlalchemy.exc import SQLAlchemyError

from phalanx_server.actions.bootstrap import CLUSTER, bootstrap
from phalanx_server.actions.create_token import NewToken, create_token
from phalanx_server.domain.access import SYSTEM
from phalanx_server.store.embedded import EmbeddedPostgres, PostgresFailed
from phalanx_server.store.engine import create_engine
from phalanx_server.store.migrate import upgrade
from phalanx_server.supervise import Child, ChildFailed, Family, end, wait_until
from phalanx_server.up_data import (
    console,
    data_directory,
    exclusive,
    keep_secret,
    kept_secret,
    make_directories,
    mount_warnings,
)
from phalanx_server.up_jobs import end_attempts, taken_up
from phalanx_server.up_stop import Stopped, StopRequest, stopped_by_signals

DEFAULT_DATA = Path("~/.phalanx").expanduser()
DEFAULT_PORT = 8321
START_TIMEOUT_S = 120.0

REPLACEMENTS = {  # the tokens that an `up` needs, should their files get lost
    "admin-token": NewToken(name="made by phalanx up", role="admin", user="admin"),
    "cluster-token": NewToken(name="made by phalanx up", role="cluster", cluster=CLUSTER),
}


@dataclass(frozen=True)
class Machine:
    """What to run on this machine, and where it keeps its data."""

    data: Path
    host: str
    port: int
    nodes: int
    gpus_per_node: int
    gpu_type: str
    labels: tuple[str, ...] = ()  # of the nodes, such as rack=r0,r1
    limits: tuple[str, ...] = ()  # options of the agent that say what an attempt may do on a node

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def path(self, name: str) -> Path:
        return self.data / name


@contextmanager
def reserved_port(host: str, port: int) -> Iterator[int]:
    """`port`, or a free one for 0, which nobody gets meanwhile who does not ask for it by its number: Ray, which starts
    beside the server, takes many. It is bound and never listened on; the server binds it too (both say that they share
    the address). SystemExit names the port if it is taken."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            reserved.bind((host, port))
        except OSError as error:
            raise SystemExit(
                f"phalanx up: cannot listen on {host}:{port} ({error.strerror}); choose another --port"
            ) from None
        yield reserved.getsockname()[1]


async def prepare_database(url: str) -> Any:
    """Migrate, and on the first run create the root tenant, the cluster and the first tokens."""
    await upgrade(url)
    engine = create_engine(url)
    try:
        return await bootstrap(engine)
    finally:
        await engine.dispose()


async def mint(url: str, wanted: NewToken) -> str:
    """Make a token in the database, past the server."""
    engine = create_engine(url)
    try:
        async with engine.begin() as conn:
            return (await create_token(conn, wanted, actor=SYSTEM, now=datetime.now(UTC))).text
    finally:
        await engine.dispose()


class Up:
    """The parts of one machine, in the order of their start."""

    def __init__(self, machine: Machine, stop_request: StopRequest) -> None:
        self.machine = machine
        self.stop_request = stop_request
        self.family = Family()
        self.postgres = EmbeddedPostgres(machine.path("postgres"))
        self.scheduler: Child | None = None
        self.agent: Child | None = None
        self.database_url = ""
        self.admin_token = ""
        self.first_run = False
        self.taken_up = ""
        self.started_at = datetime.now(UTC)

    def child(self, name: str, *arguments: str, env: dict[str, str] | None = None) -> Child:
        logs = self.machine.path("logs")
        argv = [sys.executable, "-m", "phalanx", name, *arguments]
        return Child(name, argv, {**os.environ, **(env or {})}, logs / f"{name}.log")

    def start(self) -> None:
        """Ray takes longest, so it starts first; the server side comes up beside it."""
        machine = self.machine
        ray_file = machine.path("ray") / "ray.json"
        ray_file.unlink(missing_ok=True)
        ray = self.family.start(self._ray())
        settings = self._start_database()
        server = self.family.start(
            self.child("server", "--host", machine.host, "--port", str(machine.port), env=settings)
        )
        self.scheduler = self.family.start(self.child("scheduler", env=settings))
        self._wait(lambda: self._ready(server), "the server")
        self._wait(lambda: self._written(ray, ray_file), "Ray")
        self.agent = self.family.start(self._agent())

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.stop_request.check()
            return ready()

        wait_until(look, timeout_s=START_TIMEOUT_S, what=what)

    def _ray(self) -> Child:
        machine = self.machine
        return self.child(
            "local-ray",
            *("--nodes", str(machine.nodes), "--gpus-per-node", str(machine.gpus_per_node)),
            *("--gpu-type", machine.gpu_type, "--data", str(machine.path("ray")), "--respawn"),
            *(f"--node-labels={label}" for label in machine.labels),
        )

    def _agent(self) -> Child:
        machine = self.machine
        return self.child(
            "agent",
            *("--server", machine.url, "--token-file", str(machine.path("cluster-token"))),
            *("--ray-file", str(machine.path("ray") / "ray.json")),
            *("--data", str(machine.path("nodes")), "--checkpoint-root", str(machine.path("checkpoints"))),
            *machine.limits,
        )

    def _start_database(self) -> dict[str, str]:
        self.database_url = url = self.postgres.start()
        self.stop_request.check()
        created = asyncio.run(prepare_database(url))
        self.taken_up = asyncio.run(taken_up(url))
        self.first_run = created is not None
        self.admin_token = self._token(url, "admin-token", created and created.admin_token)
        self._token(url, "cluster-token", created and created.cluster_token)
        return {
            "PHALANX_DATABASE_URL": url,
            "PHALANX_DATA_DIR": str(self.machine.data),
            "PHALANX_STORAGE_URL": self.machine.path("storage").as_uri(),
        }

    def _token(self, url: str, name: str, new: str | None) -> str:
        """The token in the file `name`: a new one, the one that is kept there, or one in its place."""
        path = self.machine.path(name)
        if new is None and (kept := kept_secret(path)):
            return kept
        if new is None:
            new = asyncio.run(mint(url, REPLACEMENTS[name]))
            console.print(
                f"{path} was missing: a new token is in it; the old one still works (see `phalanx tokens`)",
                soft_wrap=True,
            )
        return keep_secret(path, new)

    def _ready(self, server: Child) -> bool:
        server.expect_alive()
        try:
            return httpx.get(f"{self.machine.url}/readyz", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    @staticmethod
    def _written(ray: Child, ray_file: Path) -> bool:
        ray.expect_alive()
        return ray_file.exists()

    def warm_nodes(self) -> int:
        """How many nodes have a process with torch imported, ready to fork."""
        return sum(1 for node in self.nodes() if self._is_warm(node))

    def nodes(self) -> list[dict[str, Any]]:
        """As the server lists them; none while it does not answer."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        try:
            answer = httpx.get(f"{self.machine.url}/v1/nodes", headers=headers, timeout=5)
        except httpx.TransportError:
            return []
        if answer.status_code == 401:
            raise ChildFailed(
                f"the server does not know the token in {self.machine.path('admin-token')}: put a valid one there"
            )
        return answer.json()["items"] if answer.is_success else []

    def _is_warm(self, node: dict[str, Any]) -> bool:
        """As it has said since this start; what it said before an earlier end is in the database too."""
        seen_at = node["last_seen_at"]
        heard = seen_at is not None and datetime.fromisoformat(seen_at) > self.started_at
        return heard and node["state"] == "ready" and node["warm_ready"]

    def _all_warm(self) -> bool:
        self.keep_alive()
        return self.warm_nodes() >= self.machine.nodes

    def wait_warm(self) -> None:
        self._wait(self._all_warm, "torch on every node")

    def run(self, command: list[str]) -> int:
        """Run `command` with this Phalanx as its server; its exit code."""
        env = {**os.environ, "PHALANX_URL": self.machine.url, "PHALANX_TOKEN": self.admin_token}
        with subprocess.Popen(command, env=env) as process:
            try:
                while process.poll() is None:
                    self.stop_request.check()
                    self.keep_alive()
                    time.sleep(0.1)
            finally:
                end(process)
        self.stop_request.check()  # a Ctrl-C has ended the command too, in one way or another
        return process.returncode

    def stay(self) -> None:
        while True:
            self.stop_request.check()
            self.keep_alive()
            time.sleep(0.2)

    def keep_alive(self) -> None:
        """Start again what has died: nobody else does on this machine."""
        self.family.tick(time.monotonic())
        if self.postgres.pid() is None:
            console.print("PostgreSQL died; it is started again")
            self.postgres.start()

    def stop(self) -> None:
        self.machine.path("url").unlink(missing_ok=True)
        if self.scheduler is not None and self.agent is not None:  # without an agent no rank runs
            self._end_attempts(self.scheduler)
        self.family.stop()
        self.postgres.stop()

    def _end_attempts(self, scheduler: Child) -> None:
        """While server and agent can carry it out, and without the scheduler, which would start them again."""
        signals = self.stop_request.signals
        scheduler.stop()
        try:
            asyncio.run(end_attempts(self.database_url, hurry=lambda: self.stop_request.signals > signals))
        except (OSError, SQLAlchemyError) as error:  # without its database; the parts are to be stopped all the same
            console.print(f"what ran could not be put back into the queue: {error}", soft_wrap=True, markup=False)


def announce(up: Up) -> None:
    """Say the URL always, the token on the first run only; the URL is also in the file `url` while it is up."""
    machine = up.machine
    machine.path("url").write_text(machine.url + "\n")
    nodes = "1 node" if machine.nodes == 1 else f"{machine.nodes} nodes"
    console.print(
        f"Phalanx is up at [bold]{machine.url}[/]  ({nodes} × {machine.gpus_per_node} GPUs, data in {machine.data})",
        soft_wrap=True,
    )
    if up.first_run:
        console.print(
            f"Admin token, shown only now: [bold]{up.admin_token}[/]  (kept in {machine.path('admin-token')})",
            soft_wrap=True,
        )
    sign_in = f"Sign in with: phalanx login --url {machine.url} --token-file {machine.path('admin-token')}"
    console.print(sign_in, soft_wrap=True)  # to be copied: no line break of ours
    if up.taken_up:
        console.print(up.taken_up, soft_wrap=True, markup=False)
    if os.geteuid() == 0 and (warning := root_warning(up.nodes(), machine.path("logs") / "agent.log")):
        console.print(f"[bold red]{warning}[/]", soft_wrap=True)


def root_warning(nodes: list[dict[str, Any]], log: Path) -> str:
    """What to say on a machine whose runners are root, of nodes where ranks of all tenants are root as well."""
    names = ", ".join(node["name"] for node in nodes if node["alive"] and not node["own_users"])
    if not names:
        return ""
    reach = "nothing holds them off each other or this machine"
    return f"Jobs of every tenant run as root on {names}: {reach} ({log} says why)"


def bring_up(machine: Machine, command: list[str]) -> int:
    with stopped_by_signals() as stop_request:
        make_directories(machine.data)
        with exclusive(machine.data), reserved_port(machine.host, machine.port) as port:
            return _stay_up(Up(replace(machine, port=port), stop_request), command)


def _stay_up(up: Up, command: list[str]) -> int:
    try:
        with console.status("Starting PostgreSQL, the server, the scheduler and Ray"):
            up.start()
        with console.status("Importing torch on every node"):
            up.wait_warm()
        announce(up)
        if command:
            return up.run(command)
        up.stay()
        return 0
    except (Stopped, ChildFailed, PostgresFailed, TimeoutError) as error:
        if up.stop_request.made:  # what fails then, fails for that
            return 130 if command else 0
        console.print(f"[red]phalanx up:[/] {escape(str(error))}")  # it may quote a log, with any brackets
        return 1
    finally:
        with console.status("Stopping"):
            up.stop()


# What Ray takes for labels.
_NAME = r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"({_NAME}/)?{_NAME}={_NAME}(,{_NAME})*")


def up(
    data: Annotated[Path, typer.Option(help="Directory for everything that it keeps.")] = DEFAULT_DATA,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = DEFAULT_PORT,
    nodes: Annotated[int, typer.Option(min=1, max=64, help="Emulated nodes.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, max=64, help="GPUs of each emulated node.")] = 2,
    gpu_type: Annotated[str, typer.Option(help="What the emulated GPUs are called.")] = "emulated",
    node_labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE,…",
            help="A label of the emulated nodes and its values, each for equally many in a row, such as rack=r0,r1; "
            "repeatable. Topology levels are labels.",
        ),
    ] = None,
    allow_mount: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PHALANX_ALLOW_MOUNTS",
            help="Directory of this machine that jobs may mount, `:ro` at its end for only to read; repeatable.",
        ),
    ] = None,
    attempt_disk: Annotated[
        str, typer.Option(envvar="PHALANX_ATTEMPT_DISK", help="What an attempt may write into its own directories.")
    ] = "64GiB",
    command: Annotated[
        list[str] | None, typer.Argument(help="After --: run this against it, then stop; its exit code is the answer.")
    ] = None,
) -> None:
    """Run all of Phalanx on this machine: PostgreSQL, server, scheduler, Ray and its agent."""
    if command and shutil.which(command[0]) is None:
        raise SystemExit(f"phalanx up: {command[0]}: command not found")
    for label in node_labels or []:
        if not _LABEL.fullmatch(label):
            raise SystemExit(f"phalanx up: --node-labels is {label!r}: expected a label and its values: rack=r0,r1")
    for warning in mount_warnings(allow_mount or []):
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
    limits = (*(f"--allow-mount={path}" for path in allow_mount or []), f"--attempt-disk={attempt_disk}")
    machine = Machine(
        data_directory(data), host, port, nodes, gpus_per_node, gpu_type, tuple(node_labels or ()), limits
    )
    raise SystemExit(bring_up(machine, command or []))


def register(app: typer.Typer) -> None:
    app.command(context_settings={"ignore_unknown_options": False})(up)
