"""A Ray cluster on this machine whose nodes and GPUs are emulated, for `phalanx up`, the demo and the tests.

Owns the processes of that cluster, its authentication token and its session directory, and takes all of them down with
itself. Knows nothing of agents, servers or jobs: whoever uses the cluster reads its address.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import psutil

from phalanx_worker.agent.ray_environment import LOOPBACK_SETTINGS

log = logging.getLogger("phalanx.local_ray")

TEMP_PREFIX = "phx-ray-"
MEMORY_DISK = Path("/dev/shm")
HOST = "127.0.0.1"
POLL_S = 0.25
RESPAWN_AFTER_S = 3.0
OBJECT_STORE_BYTES = 80 << 20
GCS_DEATHS_MAX = 5  # within GCS_DEATHS_S: one that cannot live is not started for ever
GCS_DEATHS_S = 60.0
PR_SET_PDEATHSIG = 1

# With these a killed node is seen after about 3 s instead of 14 s (sooner would take a busy machine for a dead node),
# and released GPUs after 22 ms instead of 99 (measured). They cost a steady trickle of messages, so they are for small
# clusters only. The memory monitor would kill the small runner and not its hungry child.
EMULATION_SETTINGS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_raylet_report_resources_period_milliseconds": "20",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_gcs_storage": "rocksdb",  # GCS reads its state back when it is started again; the path is of the cluster
    **LOOPBACK_SETTINGS,
}


# The head takes no work: it only has GCS, and a raylet for drivers to join through.
HEAD_NODE = {
    "num_cpus": 0,
    "num_gpus": 0,
    "node_ip_address": HOST,
    "object_store_memory": OBJECT_STORE_BYTES,
    "labels": {"phalanx.io/role": "head"},
}


@dataclass(frozen=True)
class Emulation:
    """What to emulate. `cpus_per_node` and `memory_bytes_per_node` of 0 mean: derived from this machine. `labels`: the
    values of a label, each for equally many nodes in a row."""

    nodes: int
    gpus_per_node: int
    data_dir: Path
    gpu_type: str = "emulated"
    cpus_per_node: int = 0
    memory_bytes_per_node: int = 0
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    respawn: bool = False

    def cpus(self) -> int:
        return self.cpus_per_node or max(os.cpu_count() or 1, self.gpus_per_node)

    def labels_of(self, name: str, index: int) -> dict[str, str]:
        """The Ray labels of one node."""
        own = {"phalanx.io/node-name": name, "phalanx.io/gpu-type": self.gpu_type}
        return {key: values[index * len(values) // self.nodes] for key, values in self.labels.items()} | own

    def memory_bytes(self) -> int:
        return self.memory_bytes_per_node or int(psutil.virtual_memory().total * 0.8) // max(self.nodes, 1)


@dataclass
class LocalRay:
    """The running cluster. Must be used from the main thread: Ray ties its processes to the thread that starts them."""

    emulation: Emulation
    stop_asked: threading.Event = field(default_factory=threading.Event)
    cluster: Any = None
    nodes: dict[str, Any] = field(default_factory=dict)  # node name -> ray Node
    dead_since: dict[str, float] = field(default_factory=dict)
    head_raylet: Any = None  # the ray Node whose raylet is the head's
    gcs_deaths_s: list[float] = field(default_factory=list)

    def start(self) -> str:
        """Start head and nodes one after another (concurrent starts on one host break) and return the address."""
        from ray.cluster_utils import Cluster  # after the environment is set: Ray reads it when it is imported

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                **HEAD_NODE,
                "include_dashboard": False,
                "include_log_monitor": False,
                "no_monitor": True,  # the autoscaler's
            },
        )
        self.head_raylet = self.cluster.head_node
        for index in range(self.emulation.nodes):
            if not self.stop_asked.is_set():
                self.add_node(f"node-{index}")
        return self.cluster.address

    def add_node(self, name: str) -> None:
        self.nodes[name] = self._add_raylet(
            {
                "num_cpus": self.emulation.cpus(),
                "num_gpus": self.emulation.gpus_per_node,
                "memory": self.emulation.memory_bytes(),
                "object_store_memory": OBJECT_STORE_BYTES,
                "node_ip_address": HOST,
                "labels": self.emulation.labels_of(name, int(name.rpartition("-")[2])),
            }
        )
        self.dead_since.pop(name, None)
        log.info("node %s is up", name)

    def _add_raylet(self, arguments: dict[str, Any]) -> Any:
        node = self.cluster.add_node(**arguments)
        stop_on_signals(self.stop_asked)  # again: Ray has just installed its own handler, which drains for up to 30 s
        return node

    def check_head(self, now_s: float) -> bool:
        """Start again what was killed of the head; False when that does not help.

        GCS comes back at its old address with all that it knew, so nodes and what runs on them do not notice. A raylet
        cannot come back; another takes its place, and drivers that had joined through it have to join again.
        """
        gcs = self.cluster.head_node
        if (code := _exit_code(gcs.all_processes, "gcs_server")) is not None:
            log.warning("GCS is gone with %s: it is started again", code)
            self.gcs_deaths_s = [at_s for at_s in self.gcs_deaths_s if now_s - at_s < GCS_DEATHS_S] + [now_s]
            if len(self.gcs_deaths_s) > GCS_DEATHS_MAX:
                return False
            gcs.all_processes.pop("gcs_server", None)
            gcs._gcs_address = gcs._gcs_client = None  # as Ray's own tests do it
            gcs.start_gcs_server()
        elif (code := _exit_code(self.head_raylet.all_processes, "raylet")) is not None:
            log.warning("the head's raylet is gone with %s: another takes its place", code)
            self.head_raylet = self._add_raylet(HEAD_NODE)
        return True

    def check_nodes(self, now_s: float) -> None:
        """Clear away nodes whose raylet was killed and, if asked to, bring them back a few seconds later.

        Polling reaps the killed raylet. As a zombie it would look alive to its own workers.
        """
        for name, node in list(self.nodes.items()):
            code = _exit_code(node.all_processes, "raylet")
            if code is not None:
                log.warning("node %s is gone: its raylet exited with %s", name, code)
                del self.nodes[name]
                self.dead_since[name] = now_s
                with contextlib.suppress(Exception):  # Ray asserts about processes that vanish while it counts them
                    self.cluster.remove_node(node, allow_graceful=False)
        if self.emulation.respawn:
            for name, since_s in list(self.dead_since.items()):
                if now_s - since_s >= RESPAWN_AFTER_S:
                    self.add_node(name)

    def stop(self) -> None:
        """End every process of the cluster, those that Ray lost sight of included."""
        family = psutil.Process().children(recursive=True)
        if self.cluster is not None:
            with contextlib.suppress(Exception):
                self.cluster.shutdown()
        _, alive = psutil.wait_procs(family, timeout=1.0)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5.0)


def _exit_code(processes: dict[str, list[Any]], kind: str) -> int | None:
    """Exit code of the first process of that kind; a kind that is no longer there counts as ended."""
    entries = processes.get(kind)
    return entries[0].process.poll() if entries else -1


def run(emulation: Emulation, out: TextIO) -> int:
    """Run the cluster in the foreground until SIGTERM, SIGINT or the parent's death; return the exit code.

    When it is up, one JSON line with `address`, `token_path` and `pid` goes to `out` and to `<data>/ray.json`.
    """
    stop = threading.Event()
    stop_on_signals(stop)
    parent = os.getppid()
    _die_with_parent()
    emulation.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = emulation.data_dir
    with (
        _only_one(emulation.data_dir),
        _private_dir(record / "ray-temp-dir", Path("/tmp")) as temp_dir,
        _private_dir(record / "ray-gcs-dir", _fast_disk()) as gcs_dir,
    ):
        (emulation.data_dir / "ray.json").unlink(missing_ok=True)
        token_path = _write_token(emulation.data_dir)
        os.environ.update(
            EMULATION_SETTINGS,
            RAY_AUTH_TOKEN_PATH=str(token_path),
            RAY_TMPDIR=str(temp_dir),
            RAY_gcs_storage_path=str(gcs_dir),
        )
        local = LocalRay(emulation=emulation, stop_asked=stop)
        try:
            address = local.start()
            _announce(emulation.data_dir, {"address": address, "token_path": str(token_path), "pid": os.getpid()}, out)
            while not stop.wait(POLL_S) and os.getppid() == parent:
                if not local.check_head(time.monotonic()):
                    log.error("GCS of the local Ray cluster ends as soon as it is started")
                    return 1
                local.check_nodes(time.monotonic())
            return 0
        except SystemExit:  # Ray's own handler, which a signal finds in place while a node is being started
            return 0
        finally:
            local.stop()
            (emulation.data_dir / "ray.json").unlink(missing_ok=True)


def stop_on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _announce(data_dir: Path, facts: dict[str, Any], out: TextIO) -> None:
    line = json.dumps(facts)
    fresh = data_dir / "ray.json.new"
    fresh.write_text(line + "\n")
    fresh.replace(data_dir / "ray.json")
    print(line, file=out, flush=True)


def _write_token(data_dir: Path) -> Path:
    """A new secret for every start, readable by this user alone."""
    path = data_dir / "ray-token"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    return path


@contextlib.contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """Hold the data directory, or exit with a message if another local cluster has it."""
    with open(data_dir / "ray.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"another local Ray cluster is running with {data_dir}") from None
        yield


def _fast_disk() -> Path:
    """Where GCS keeps its state. It need not outlive this machine's memory, and each gang waits for its writes: 3 ms of
    a gang's start on a disk."""
    return MEMORY_DISK if os.access(MEMORY_DISK, os.W_OK) else Path("/tmp")


@contextlib.contextmanager
def _private_dir(record: Path, parent: Path) -> Iterator[Path]:
    """A private directory of this cluster with a short path: socket paths may have 107 bytes, and Ray makes its own
    files 0777.

    The directory of an earlier cluster that was killed is removed first; its name is kept in `record`.
    """
    if record.exists() and Path(record.read_text()).name.startswith(TEMP_PREFIX):
        shutil.rmtree(record.read_text(), ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=parent))
    record.write_text(str(path))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        record.unlink(missing_ok=True)
