"""On a GPU: from the order to start until the first optimizer step, beside a bare fork of a process that has torch.

    python benchmarks/gpu_start.py [--runs N]

Both do the same: CUDA, NCCL with one rank, one step under DistributedDataParallel. The budget is on the difference: a
runner may add at most 150 ms. Needs an NVIDIA GPU and torch with CUDA; no server, no Ray.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
from phalanx_worker import protocol
from phalanx_worker.node.service import Runner
from phalanx_worker.protocol import DesiredAttempt, GroupPlacement, Launch

BUDGET_MS = 150.0
STEP = """
import os, sys, time, torch, torch.distributed as dist
dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(64, 64).cuda(), device_ids=[0])
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
model(torch.randn(8, 64, device="cuda")).square().mean().backward()
optimizer.step()
torch.cuda.synchronize()
open(sys.argv[1], "w").write(repr(time.time()))
"""
# What a bare prototype would do: import, wait for a line, fork, run.
BARE = """
import os, sys, time
import torch, torch._dynamo, torch.distributed, torch.nn.parallel
print("ready", flush=True)
for line in sys.stdin:
    began = time.time()
    if os.fork() == 0:
        done, port = line.split()
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        sys.argv = ["step", done]
        exec(compile(sys.stdin_step, "step", "exec"), {"__name__": "__main__"})
        os._exit(0)
    os.wait()
    print(repr(began), flush=True)
"""


def bare_forks(runs: int, directory: Path) -> list[float]:
    """Seconds from the fork to the first step."""
    source = BARE.replace("sys.stdin_step", repr(STEP))
    process = subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=directory
    )
    assert process.stdin and process.stdout
    process.stdout.readline()
    totals = []
    for run in range(runs):
        done = directory / f"bare-{run}"
        process.stdin.write(f"{done} {29500 + run}\n")
        process.stdin.flush()
        began = float(process.stdout.readline())
        totals.append(float(done.read_text()) - began)
    process.stdin.close()
    process.wait()
    return totals


def attempt(number: int, command: str) -> DesiredAttempt:
    launch = Launch(command, {}, world_size=1, bundle=None, cpus_per_group=[4.0], memory_bytes_per_group=[0])
    return DesiredAttempt(
        attempt_id=f"att_{number:032x}",
        job_id=f"job_{number:032x}",
        job_name="gpu-start",
        tenant="default",
        tenant_uid=70001,
        number=1,
        epoch=1,
        action="run",
        grace_s=5.0,
        groups=[GroupPlacement("node-0", 1, [0], 0, 0, 1)],
        launch=launch,
    )


async def one_start(runner: Runner, number: int, command: str) -> float:
    """Run one attempt to its end; when it was ordered."""
    wanted = attempt(number, command)
    began = time.time()
    master = await runner.reserve_rendezvous(wanted.attempt_id)
    await runner.start_group(
        {
            "desired": protocol.encode(wanted),
            "group_rank": 0,
            "master_addr": master["host"],
            "master_port": master["port"],
            "hosts_rendezvous": True,
        }
    )
    seq = -1
    while True:
        facts = await runner.next_facts(seq, 5)
        seq = facts["seq"]
        if any(group["state"] == "ended" for group in facts["groups"]):
            break
    await runner.forget_group(wanted.attempt_id)
    return began


async def under_runner(runs: int, directory: Path) -> list[float]:
    """Seconds from the order to the first step."""
    script = directory / "step.py"
    script.write_text(STEP)
    runner = Runner()
    settings = {"server_url": "http://127.0.0.1:9", "node_token": "none", "data_dir": str(directory / "node")}
    await runner.configure(settings)
    files = [directory / f"run-{run}" for run in range(runs)]
    numbers = range(os.getpid() * 1000, os.getpid() * 1000 + runs)
    try:
        began = [
            await one_start(runner, number, f"python {script} {file}")
            for number, file in zip(numbers, files, strict=True)
        ]
    finally:
        await runner.close()
    return [float(file.read_text()) - at for file, at in zip(files, began, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="phx-gpu-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        directory.chmod(0o755)
        bare = bare_forks(runs + 1, directory)[1:]
        ours = asyncio.run(under_runner(runs + 1, directory))[1:]
    rows = []
    for title, totals in (("bare fork", bare), ("under Phalanx", ours)):
        p50, p95 = (measure.percentile(totals, share) * 1e3 for share in (0.5, 0.95))
        rows.append(
            [title, str(runs), f"{p50:,.0f}", f"{p95:,.0f}", f"{min(totals) * 1e3:,.0f}–{max(totals) * 1e3:,.0f}"]
        )
    measure.show("start → first optimizer step on one GPU (ms)", ["", "runs", "p50", "p95", "min–max"], rows)
    added_ms = (measure.percentile(ours, 0.5) - measure.percentile(bare, 0.5)) * 1e3
    print(f"added by Phalanx: {added_ms:,.0f} ms (budget {BUDGET_MS:.0f})")


if __name__ == "__main__":
    main()
