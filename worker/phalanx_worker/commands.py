"""The commands that come with the worker package, plugged into `phalanx` through its entry-point group.

Ray and the rest are imported inside the commands: `phalanx --help` must not wait seconds for them, and Ray reads its
environment when it is imported.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
EXIT_USAGE = 2

Server = Annotated[str, typer.Option(envvar="PHALANX_SERVER_URL", help="URL of the Phalanx server.")]
Data = Annotated[Path, typer.Option(envvar="PHALANX_DATA_DIR", help="Directory on every node for what runs there.")]
CheckpointRoot = Annotated[
    str, typer.Option(envvar="PHALANX_CHECKPOINT_ROOT", help="Directory or URL that holds the jobs' checkpoints.")
]
TokenFile = Annotated[
    Path | None, typer.Option(envvar="PHALANX_CLUSTER_TOKEN_FILE", help="File with the cluster token.")
]
RayAddress = Annotated[
    str | None, typer.Option(envvar=["PHALANX_RAY_ADDRESS", "RAY_ADDRESS"], help="host:port of the Ray head.")
]
RayFile = Annotated[Path | None, typer.Option(help="The ray.json of `phalanx local-ray`, instead.")]
GpuType = Annotated[
    str | None, typer.Option(envvar="PHALANX_GPU_TYPE", help="What GPUs are called on nodes without a label.")
]
SharedCheckpoints = Annotated[
    bool | None,
    typer.Option(
        "--shared-checkpoints/--local-checkpoints",
        envvar="PHALANX_SHARED_CHECKPOINTS",
        help="Whether every node sees the same checkpoint root. Default: only where all nodes are one machine.",
    ),
]
OwnUsers = Annotated[
    bool,
    typer.Option(
        "--own-users/--no-own-users",
        envvar="PHALANX_OWN_USERS",
        help="Run the ranks of each tenant under their own Unix user, on nodes where the runner is root.",
    ),
]
RequireOwnUsers = Annotated[
    bool,
    typer.Option(
        "--require-own-users",
        envvar="PHALANX_REQUIRE_OWN_USERS",
        help="Start nothing on a node that cannot do that, instead of running ranks as the runner's user.",
    ),
]
EnvironmentsDisk = Annotated[
    str,
    typer.Option(envvar="PHALANX_ENVIRONMENTS_DISK", help="Space for jobs' environments on each node, such as 20GiB."),
]
AllowMount = Annotated[
    list[str] | None,
    typer.Option(
        envvar="PHALANX_ALLOW_MOUNTS",
        help="Directory of the nodes that jobs may mount, `:ro` at its end for only to read; repeatable. In the "
        "variable they are separated by spaces.",
    ),
]
AttemptDisk = Annotated[
    str,
    typer.Option(
        envvar="PHALANX_ATTEMPT_DISK",
        help="What an attempt may write into its own directories on a node, such as 64GiB; 0: as much as it likes.",
    ),
]
RunnerSilent = Annotated[
    float, typer.Option(hidden=True, min=1, help="A runner that answers nothing for so long is killed.")
]


def register(app: typer.Typer) -> None:
    app.command()(agent)
    app.command("local-ray", hidden=True)(local_ray)


def agent(
    server: Server,
    data: Data,
    checkpoint_root: CheckpointRoot,
    token_file: TokenFile = None,
    ray_address: RayAddress = None,
    ray_file: RayFile = None,
    gpu_type: GpuType = None,
    shared_checkpoints: SharedCheckpoints = None,
    own_users: OwnUsers = True,
    require_own_users: RequireOwnUsers = False,
    environments_disk: EnvironmentsDisk = "20GiB",
    allow_mount: AllowMount = None,
    attempt_disk: AttemptDisk = "64GiB",
    runner_silent_s: RunnerSilent = 60.0,
) -> None:
    """Run the agent of one Ray cluster: it starts and watches what the server wants there."""
    from phalanx_worker.agent.ray_environment import prepare
    from phalanx_worker.agent.service import RunnerSettings

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    token = _token(token_file)
    if require_own_users and not own_users:
        raise _usage("--require-own-users and --no-own-users exclude each other")
    runner = RunnerSettings(
        server_url=server,
        data_dir=str(data.absolute()),
        checkpoint_root=checkpoint_root,
        own_users=own_users,
        require_own_users=require_own_users,
        environments_bytes=_size("--environments-disk", environments_disk, at_least="1GiB"),
        allow_mounts=_mounts(allow_mount or []),
        disk_bytes=_size("--attempt-disk", attempt_disk),
    )
    address = _ray_address(ray_address, ray_file)
    prepare(address)
    from phalanx_worker.agent.main import AgentSettings, leave, run  # this imports Ray
    from phalanx_worker.agent.nodes import NodeSettings

    settings = AgentSettings(
        server_url=server,
        token=token,
        ray_address=address,
        runner=runner,
        nodes=NodeSettings(gpu_type=gpu_type, shared_checkpoints=shared_checkpoints),
        runner_silent_s=runner_silent_s,
    )
    leave(run(settings))


def _token(file: Path | None) -> Callable[[], str]:
    """The cluster token as it is now; out of the environment it is taken, for nothing that Ray starts from here."""
    token = os.environ.pop("PHALANX_CLUSTER_TOKEN", "")
    if file is None and not token:
        raise _usage("no cluster token: give --token-file or set PHALANX_CLUSTER_TOKEN")
    if file is None:
        return lambda: token
    if not file.is_file():
        raise _usage(f"{file}: no such file")
    return lambda: file.read_text().strip()


def _mounts(texts: list[str]) -> tuple[str, ...]:
    from phalanx_worker.node.mounts import Allowed

    try:
        return tuple(Allowed.read(text).as_written for text in texts)
    except ValueError as error:
        raise _usage(f"--allow-mount: {error}") from None


def _size(option: str, text: str, *, at_least: str = "0") -> int:
    from phalanx_worker.node import sizes

    try:
        size_bytes = sizes.read(text)
    except ValueError as error:
        raise _usage(f"{option}: {error}") from None
    if size_bytes < sizes.read(at_least):
        raise _usage(f"{option} is {text}: give at least {at_least}")
    return size_bytes


def _ray_address(given: str | None, file: Path | None) -> str:
    """Waits for the file of a local Ray that is coming up."""
    from phalanx_worker.agent.ray_environment import read_ray_file

    if (given is None) == (file is None):
        raise _usage("give either --ray-address or --ray-file")
    try:
        return given or read_ray_file(file or Path())
    except (TimeoutError, PermissionError) as error:
        raise _usage(str(error)) from None


def local_ray(
    nodes: Annotated[int, typer.Option(min=1, help="Emulated nodes.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each.")],
    data: Annotated[Path, typer.Option(help="Directory for its address and token.")],
    gpu_type: Annotated[str, typer.Option(help="What the GPUs are called.")] = "emulated",
    cpus_per_node: Annotated[int, typer.Option(min=0, help="CPUs of each; 0: those of this machine.")] = 0,
    node_labels: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE,…", help="A label and its values over the nodes; repeatable.")
    ] = None,
    respawn: Annotated[bool, typer.Option(help="Bring a killed node back after a few seconds.")] = False,
) -> None:
    """Run a Ray cluster of emulated nodes in the foreground."""
    from phalanx_worker.agent.emulated import Emulation, run

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    emulation = Emulation(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        data_dir=data.absolute(),
        gpu_type=gpu_type,
        cpus_per_node=cpus_per_node,
        labels=dict(map(_label, node_labels or [])),
        respawn=respawn,
    )
    raise SystemExit(run(emulation, sys.stdout))


def _label(text: str) -> tuple[str, tuple[str, ...]]:
    key, equals, values = text.partition("=")
    if not key or not equals or not all(values.split(",")):
        raise _usage(f"--node-labels is {text!r}: expected a label and its values, such as rack=r0,r1")
    return key, tuple(values.split(","))


def _usage(message: str) -> typer.Exit:
    typer.echo(f"phalanx agent: {message}", err=True)
    return typer.Exit(EXIT_USAGE)
