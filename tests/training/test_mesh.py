"""Tests of the process groups: that every tensor that a layout exchanges finds a backend on its device."""

import os

import pytest
import torch
import torch.distributed as dist
from phalanx_worker.training import main, mesh
from torch.distributed.distributed_c10d import Backend, BackendConfig

GPU = torch.device("cuda", 0)


class Joined(Exception):
    """Stands for all that comes after the process group; its text is the backend."""


@pytest.fixture
def a_rank_on_a_gpu(monkeypatch):
    """Of a gang; it gets as far as the process group."""

    def join(backend, **_):
        raise Joined(backend)

    monkeypatch.setattr(main, "own_device", lambda wanted: GPU)
    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setitem(os.environ, "RANK", "0")


def backends_of(*settings):
    """By device, of the process group that `lm` joins."""
    with pytest.raises(Joined) as joined:
        main.run(["lm", '{"data": {"paths": ["unread"]}}', *settings])
    config = BackendConfig(Backend(str(joined.value)))  # pyright: ignore[reportArgumentType]  (a Backend is a string)
    return config.get_device_backend_map()


@pytest.mark.usefixtures("a_rank_on_a_gpu")
def test_gradients_that_lie_in_host_memory_are_exchanged_over_gloo_and_all_else_over_nccl():
    assert backends_of("parallel.shard=2", "parallel.offload=true") == {"cpu": "gloo", "cuda": "nccl"}


@pytest.mark.usefixtures("a_rank_on_a_gpu")
def test_a_rank_whose_tensors_are_all_on_the_gpu_joins_nccl_alone():
    assert backends_of("parallel.shard=2") == {"cuda": "nccl"}


@pytest.mark.parametrize("offload", [False, True])
def test_without_gpus_all_goes_over_gloo(offload):
    assert mesh._backends(torch.device("cpu"), offload=offload) == "gloo"
