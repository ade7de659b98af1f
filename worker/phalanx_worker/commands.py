"""The commands that come with the worker package, plugged into `phalanx` through its entry-point group.

Ray and the rest are imported inside the commands: `phalanx --help` must not wait seconds for them, and Ray reads its
environment when it is imported.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

LOG_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
EXIT_USAGE = 2
LEAST_ENVIRONMENTS_BYTES = 1 << 30


def register(app: typer.Typer) -> None:
    app.command()(agent)
    app.command("local-ray", hidden=True)(local_ray)


def agent(
    server: Annotated[str, typer.Option(envvar="PHALANX_SERVER_URL", help="URL of the Phalanx server.")],
    data: Annotated[Path, typer.Option(envvar="PHALANX_DATA_DIR", help="Directory on every node for what runs there.")],
    checkpoint_root: Annotated[
        str, typer.Option(envvar="PHALANX_CHECKPOINT_ROOT", help="Directory or URL that holds the jobs' checkpoints.")
    ],
    token_file: Annotated[
        Path | None, typer.Option(envvar="PHALANX_CLUSTER_TOKEN_FILE", help="File with the cluster token.")
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(envvar=["PHALANX_RAY_ADDRESS", "RAY_ADDRESS"], help="host:port of the Ray head.")
    ] = None,
    ray_file: Annotated[Path | None, typer.Option(help="The ray.json of `phalanx local-ray`, instead.")] = None,
    gpu_type: Annotated[
        str | None, typer.Option(envvar="PHALANX_GPU_TYPE", help="What GPUs are called on nodes without a label.")
    ] = None,
    shared_checkpoints: Annotated[
        bool | None,
        typer.Option(
            "--shared-checkpoints/--local-checkpoints",
            envvar="PHALANX_SHARED_CHECKPOINTS",
            help="Whether every node sees the same checkpoint root. Default: only where all nodes are one machine.",
        ),
    ] = None,
    own_users: Annotated[
        bool,
        typer.Option(
            "--own-users/--no-own-users",
            envvar="PHALANX_OWN_USERS",
            help="Run the ranks of each tenant under their own Unix user, on nodes where the runner is root.",
        ),
    ] = True,
    require_own_users: Annotated[
        bool,
        typer.Option(
            "--require-own-users",
            envvar="PHALANX_REQUIRE_OWN_USERS",
            help="Start nothing on a node that cannot do that, instead of running ranks as the runner's user.",
        ),
    ] = False,
    environments_disk: Annotated[
        str,
        typer.Option(
            envvar="PHALANX_ENVIRONMENTS_DISK",
            help="Space for jobs' environments on each node, such as 20GiB.",
        ),
    ] = "20GiB",
    allow_mount: Annotated[
        list[str] | None,
        typer.Option(
            envvar="PHALANX_ALLOW_MOUNTS",
            help="Directory of the nodes that jobs may mount, `:ro` at its end for only to read; repeatable. In the "
            "variable they are separated by spaces.",
        ),
    ] = None,
    attempt_disk: Annotated[
        str,
        typer.Option(
            envvar="PHALANX_ATTEMPT_DISK",
            help="What an attempt may write into its own directories on a node, such as 64GiB; 0: as much as it likes.",
        ),
    ] = "64GiB",
    runner_silent_s: Annotated[
        float, typer.Option(hidden=True, min=1, help="A runner that answers nothing for so long is killed.")
    ] = 60.0,
) -> None:
    """Run the agent of one Ray cluster: it starts and watches what the server wants there."""
    from phalanx_worker.agent.ray_environment import prepare, read_ray_file
    from phalanx_worker.node import mounts, sizes

    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    token = os.environ.pop("PHALANX_CLUSTER_TOKEN", "")  # not inherited by anything that Ray starts from here
    if token_file is None and not token:
        raise _usage("no cluster token: give --token-file or set PHALANX_CLUSTER_TOKEN")
    if token_file is not None and not token_file.is_file():
        raise _usage(f"{token_file}: no such file")
    if (ray_address is None) == (ray_file is None):
        raise _usage("give either --ray-address or --ray-file")
    if require_own_users and not own_users:
        raise _usage("--require-own-users and --no-own-users exclude each other")
    try:
        allow_mounts = [mounts.Allowed.read(text).as_written for text in allow_mount or []]
        disk_bytes = sizes.read(attempt_disk)
        environments_bytes = sizes.read(environments_disk)
    except ValueError as error:
        raise _usage(str(error)) from None
    if environments_bytes < LEAST_ENVIRONMENTS_BYTES:
        raise _usage(f"--environments-disk is {environments_disk}: give at least 1GiB")
    try:
        address = ray_address or read_ray_file(ray_file or Path())
    except (TimeoutError, PermissionError) as error:
        raise _usage(str(error)) from None
    prepare(address)
    from phalanx_worker.agent.main import AgentSettings, file_token, leave, run
    from phalanx_worker.agent.nodes import NodeSettings
    from phalanx_worker.agent.service import RunnerSettings

    runner = RunnerSettings(
        server_url=server,
        data_dir=str(data.absolute()),
        checkpoint_root=checkpoint_root,
        own_users=own_users,
        require_own_users=require_own_users,
        environments_bytes=environments_bytes,
        allow_mounts=tuple(allow_mounts),
        disk_bytes=disk_bytes,
    )
    nodes = NodeSettings(gpu_type=gpu_type, shared_checkpoints=shared_checkpoints)
    settings = AgentSettings(
        server_url=server,
        token=file_token(token_file) if token_file is not None else lambda: token,
        ray_address=address,
        runner=runner,
        nodes=nodes,
        runner_silent_s=runner_silent_s,
    )
    leave(run(settings))


def local_ray(
    nodes: Annotated[int, typer.Option(min=1, help="Emulated nodes.")],
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs of each.")],
    data: Annotated[Path, typer.Option(help="Directory for its address and token.")],
    gpu_type: Annotated[str, typer.Option(help="What the GPUs are called.")] = "emulated",
    cpus_per_node: Annotated[int, typer.Option(min=0, help="CPUs of each; 0: those of this machine.")] = 0,
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
        respawn=respawn,
    )
    raise SystemExit(run(emulation, sys.stdout))


def _usage(message: str) -> typer.Exit:
    typer.echo(f"phalanx agent: {message}", err=True)
    return typer.Exit(EXIT_USAGE)
