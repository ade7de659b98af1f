"""The environment of a rank: a short allow-list of the node's own, torchrun's variables, Phalanx's, the user's.

Owns the names. Everything else of the runner's environment (Ray's token, cloud credentials, Phalanx's secrets) never
reaches a rank, because it is never copied. Pure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from phalanx_worker.node.orders import GroupOrder

# What an operator sets on the node for programs in general, and nothing that is a secret.
# fmt: off
_KEPT = frozenset({
    "PATH", "LANG", "LANGUAGE", "TZ", "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
})
# fmt: on
_KEPT_PREFIXES = ("LC_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "FI_", "OMPI_MCA_")


@dataclass(frozen=True)
class Places:
    """Directories of one group of one attempt; `checkpoints` may be a URL."""

    root: str
    work: str
    home: str
    tmp: str
    output: str
    checkpoints: str


def node_environment(source: Mapping[str, str], *, python: str) -> dict[str, str]:
    """What may be passed on from the runner's own environment; `python` on PATH is the runner's."""
    kept = {name: value for name, value in source.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    directory = os.path.dirname(python)  # noqa: PTH120 - kept as spelled: a venv's python is a link
    path = kept.get("PATH") or "/usr/local/bin:/usr/bin:/bin"
    return {**kept, "PATH": path if path.split(":")[0] == directory else f"{directory}:{path}"}


def warm_environment(source: Mapping[str, str], *, python: str) -> dict[str, str]:
    """For the warm process: one thread in every pool, and no look at a GPU (NVML answers instead of CUDA)."""
    single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return {**node_environment(source, python=python), **single, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


def group_environment(
    order: GroupOrder, places: Places, *, node_env: Mapping[str, str], user: str, hosted_store: bool
) -> dict[str, str]:
    """What all ranks of a group share. The user's variables may change the node's, never the contract's."""
    launch = order.desired.launch
    defaults = {
        **({"OMP_NUM_THREADS": "1"} if order.group.ranks > 1 else {}),  # as torchrun
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "PYTHONUNBUFFERED": "1",
        "HOME": places.home,
        "TMPDIR": places.tmp,
        "USER": user,
        "LOGNAME": user,
    }
    contract = _torchrun(order, hosted_store=hosted_store) | _phalanx(order, places)
    if order.desired.traceparent:
        contract["TRACEPARENT"] = order.desired.traceparent
    return {**node_env, **defaults, **launch.env, **contract}


def rank_environment(order: GroupOrder, local_rank: int, places: Places) -> dict[str, str]:
    """What differs from rank to rank."""
    rank = str(order.group.first_rank + local_rank)
    error_file = f"{places.tmp}/error-{rank}.json"
    return {"RANK": rank, "ROLE_RANK": rank, "LOCAL_RANK": str(local_rank), "TORCHELASTIC_ERROR_FILE": error_file}


def _torchrun(order: GroupOrder, *, hosted_store: bool) -> dict[str, str]:
    world_size = str(order.desired.launch.world_size)
    restarts = str(order.desired.number - 1)
    return {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": str(order.group.ranks),
        "GROUP_RANK": str(order.group.group_rank),
        "GROUP_WORLD_SIZE": str(len(order.desired.groups)),
        "ROLE_NAME": "default",
        "ROLE_WORLD_SIZE": world_size,
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in order.group.gpu_indices),
        "MASTER_ADDR": order.master_addr,
        "MASTER_PORT": str(order.master_port),
        "TORCHELASTIC_RUN_ID": order.attempt_id,
        "TORCHELASTIC_RESTART_COUNT": restarts,
        "TORCHELASTIC_MAX_RESTARTS": restarts,
        "TORCHELASTIC_USE_AGENT_STORE": str(hosted_store),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    }


def _phalanx(order: GroupOrder, places: Places) -> dict[str, str]:
    return {
        "PHALANX_JOB_ID": order.desired.job_id,
        "PHALANX_JOB_NAME": order.desired.job_name,
        "PHALANX_ATTEMPT": str(order.desired.number),
        "PHALANX_ATTEMPT_ID": order.attempt_id,
        "PHALANX_TENANT": order.desired.tenant,
        "PHALANX_CHECKPOINT_DIR": places.checkpoints,
        "PHALANX_RESUME_FROM": order.desired.launch.resume_from or "",
        "PHALANX_OUTPUT_DIR": places.output,
    }
