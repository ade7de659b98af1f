"""What only a real GPU can show: CUDA in forks of the warm process, NCCL, NVML's figures, and who uses which GPU."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from phalanx_worker.node.devices import Devices

GPUS = Devices().gpus
pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.skipif(not GPUS, reason="no NVIDIA GPU here")]

DDP_STEP = """
    import os, torch, torch.distributed as dist
    dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64).cuda(), device_ids=[0])
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    loss = model(torch.randn(8, 64, device="cuda")).square().mean()
    loss.backward()
    optimizer.step()
    total = torch.ones(1, device="cuda")
    dist.all_reduce(total)
    print("visible", os.environ["CUDA_VISIBLE_DEVICES"], torch.cuda.device_count(), int(total), loss.isfinite().item())
    dist.destroy_process_group()
"""


async def test_a_warm_rank_trains_with_nccl_on_its_gpu(workbench: Any) -> None:
    attempt = workbench.attempt(f"python {workbench.script(DDP_STEP)}")
    exits = await attempt.run()
    assert [start["warm"] for start in attempt.starts] == [True], attempt.starts
    assert [end["exit_code"] for end in exits] == [0], workbench.server.text(attempt.id, rank=0, stream="stderr")
    assert workbench.server.text(attempt.id, rank=0) == "visible 0 1 1 True\n"
    assert workbench.server.marks(attempt.id, "first_step"), "the optimizer step was not noticed"


async def test_forks_after_a_rank_used_the_gpu_start_warm_too(workbench: Any) -> None:
    for _ in range(2):
        attempt = workbench.attempt(f"python {workbench.script(DDP_STEP)}")
        assert [end["exit_code"] for end in await attempt.run()] == [0]
        assert attempt.starts[0]["warm"], attempt.starts[0]["cold_reason"]


async def test_the_heartbeat_has_the_gpus_figures(workbench: Any) -> None:
    def figures() -> list[dict[str, Any]]:
        beats = [report["heartbeat"] for report in workbench.server.reports if report["heartbeat"]]
        return beats[-1]["stats"]["gpus"] if beats else []

    await workbench.server.until(lambda: len(figures()) == GPUS)
    assert all(gpu["memory_bytes"] > 0 and gpu["power_w"] > 1 and gpu["temperature_c"] > 1 for gpu in figures())


async def test_a_rank_on_a_gpu_that_it_was_not_given_is_ended(workbench: Any) -> None:
    script = """
        import os, time
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"
        import torch
        held = torch.ones(1 << 20, device="cuda")
        print("took it", flush=True)
        time.sleep(120)
    """
    attempt = workbench.attempt(f"python -X faulthandler {workbench.script(script)}")
    placed = attempt.desired.groups[0]
    placed.gpu_indices.clear()  # a CPU job
    began = time.monotonic()
    await attempt.start()
    assert not attempt.starts[0]["warm"], "a fork would have read the variable before"
    (end,) = await attempt.exits()
    assert end["signal"] == 9 and time.monotonic() - began < 60
    (note,) = workbench.server.marks(attempt.id, "note")
    assert note["data"]["message"].startswith("a rank used GPU 0 of its node, which it was not given")


async def test_gpu_memory_is_free_when_the_attempt_has_ended(workbench: Any) -> None:
    script = """
        import torch, time
        held = torch.ones(4 << 30, dtype=torch.uint8, device="cuda")
        print("holds", flush=True)
        time.sleep(120)
    """
    devices = Devices()
    before = devices.read().gpus[0].memory_bytes
    attempt = await workbench.attempt(f"python {workbench.script(script)}").start()
    await attempt.printed("holds")
    assert await asyncio.to_thread(lambda: devices.read().gpus[0].memory_bytes) - before > 4 << 30
    await attempt.runners[0].kill_group(attempt.id)
    await attempt.exits()
    assert devices.read().gpus[0].memory_bytes - before < 1 << 30
