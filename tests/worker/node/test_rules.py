"""Pure rules of a node: how a command is run, what a rank's environment holds, what devices say."""

from __future__ import annotations

import types
from typing import Any

import pytest
from phalanx_worker.node import environment
from phalanx_worker.node.command import plan_launch
from phalanx_worker.node.devices import Devices
from phalanx_worker.node.halves import Halves
from phalanx_worker.node.orders import GroupOrder, Settings, StartFailed
from phalanx_worker.node.outbox import Batch, Item
from phalanx_worker.node.reports import MAX_VALUES, Merger
from phalanx_worker.runtime.stragglers import Stragglers

PYTHON = "/opt/venv/bin/python"

COMMANDS = {
    "a script": ("python train.py --lr 3e-4", {}, ["train.py", "--lr", "3e-4"], ""),
    "a script with -u": ("python -u train.py", {}, ["train.py"], ""),
    "a module": ("python3 -m pkg.train --x 'a b'", {}, ["pkg.train", "--x", "a b"], ""),
    "the venv's own path": ("/opt/venv/bin/python3 train.py", {}, ["train.py"], ""),
    "quoted special characters": ("python train.py --name 'run (1) $x'", {}, ["train.py", "--name", "run (1) $x"], ""),
    "an escaped one": (r"python train.py a\&b", {}, ["train.py", "a&b"], ""),
    "a thread count": ("python train.py", {"OMP_NUM_THREADS": "4"}, ["train.py"], ""),
    "a NCCL variable": ("python train.py", {"NCCL_DEBUG": "INFO"}, ["train.py"], ""),
    "another python": ("/usr/bin/python3 train.py", {}, None, "not Python"),
    "a pipe": ("python train.py | tee log", {}, None, "needs a shell"),
    "a variable in double quotes": ('python train.py "$RANK"', {}, None, "needs a shell"),
    "an assignment": ("A=1 python train.py", {}, None, "needs a shell"),
    "a builtin": ("exit 3", {}, None, "needs a shell"),
    "an interpreter flag": ("python -O train.py", {}, None, "only `python script.py`"),
    "code on the command line": ("python -c 'print(1)'", {}, None, "only `python script.py`"),
    "a preloaded library": ("python train.py", {"LD_PRELOAD": "x.so"}, None, "LD_PRELOAD is set"),
    "a hash seed": ("python train.py", {"PYTHONHASHSEED": "0"}, None, "PYTHONHASHSEED is set"),
    "a torch log setting": ("python train.py", {"TORCH_LOGS": "dynamo"}, None, "TORCH_LOGS is set"),
    "a search path": ("python train.py", {"PATH": "/other"}, None, "PATH is set"),
    "the version": ("python3.11 train.py", {}, ["train.py"], ""),
    "another version": ("python3.9 train.py", {}, None, "python3.9 is not the node's Python 3.11"),
    "an odd thread count": ("python train.py", {"OMP_NUM_THREADS": "2,1"}, None, "not one number"),
    "another program": ("nvidia-smi -L", {}, None, "nvidia-smi is not Python"),
}


@pytest.mark.parametrize(("command", "env", "argv", "reason"), COMMANDS.values(), ids=COMMANDS.keys())
def test_command_starts_warm_or_says_why_not(command: str, env: dict[str, str], argv: Any, reason: str) -> None:
    launch = plan_launch(command, env, python=PYTHON, version="3.11", warm_unfit="")
    assert launch.warm == (argv is not None)
    assert reason in launch.cold_reason and bool(reason) == bool(launch.cold_reason)
    if argv is not None:
        assert launch.program.argv == argv
    elif "shell" in reason:
        assert launch.program.argv == ["/bin/sh", "-c", command]


def test_command_starts_cold_when_the_warm_process_is_unfit() -> None:
    launch = plan_launch("python train.py", {}, python=PYTHON, version="3.11", warm_unfit="torch is not available here")
    assert (launch.program.kind, launch.cold_reason) == ("exec", "torch is not available here")
    assert launch.program.argv[0] == "python" and launch.program.argv[-2:] == ["script", "train.py"]


@pytest.mark.parametrize(
    ("command", "env"),
    [("python train.py", {"PATH": "/other"}), ("python3.9 train.py", {}), ("/opt/venv/bin/python3.9 -m x", {})],
)
def test_a_python_that_may_be_another_is_executed_as_given(command: str, env: dict[str, str]) -> None:
    """It need not have anything of ours installed."""
    launch = plan_launch(command, env, python=PYTHON, version="3.11", warm_unfit="")
    assert (launch.program.kind, launch.program.argv) == ("exec", command.split())


def test_stragglers_are_ranks_that_do_nothing_after_another_was_done() -> None:
    stragglers = Stragglers(300.0)
    assert stragglers.look_at is None
    stragglers.begin(0.0)
    found = {at: stragglers.look(at, {1: 50, 2: int(at)}) for at in range(0, 361, 30)}
    assert [at for at, pids in found.items() if pids] == [300, 330, 360]
    assert found[300] == [1]


def test_a_straggler_is_given_time_where_the_whole_node_was_stopped() -> None:
    stragglers = Stragglers(300.0)
    stragglers.begin(0.0)
    assert [stragglers.look(at, {1: 50}) for at in (0.0, 30.0, 5_000.0, 5_030.0)] == [[]] * 4


def test_node_environment_is_an_allow_list_with_our_python_first() -> None:
    source = {
        "PATH": "/usr/bin",
        "NCCL_SOCKET_IFNAME": "eth0",
        "RAY_AUTH_TOKEN_PATH": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "PHALANX_CLUSTER_TOKEN": "x",
        "PYTHONPATH": "/x",
    }
    assert environment.node_environment(source, python=PYTHON) == {
        "PATH": "/opt/venv/bin:/usr/bin",
        "NCCL_SOCKET_IFNAME": "eth0",
    }


def test_settings_name_what_is_missing_and_ignore_what_is_new() -> None:
    with pytest.raises(ValueError, match="lack node_token"):
        Settings.read({"server_url": "http://x", "data_dir": "/x", "node_id": "of an older agent", "invented": 1})


def test_order_that_makes_no_sense_is_a_failed_start() -> None:
    with pytest.raises(StartFailed, match="cannot be read"):
        GroupOrder.read({"desired": {}, "group_rank": 0})


class FakeNvml:
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        self.users = {0: [41], 1: [42]}

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> Any:
        return types.SimpleNamespace(gpu=50)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return types.SimpleNamespace(used=1 << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        raise RuntimeError("not supported")

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 60

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> Any:
        return [types.SimpleNamespace(pid=pid) for pid in self.users[handle]]


def test_gpu_figures_come_from_nvml_and_unsupported_ones_are_null() -> None:
    devices = Devices(FakeNvml())
    gpu = devices.read().gpus[1]
    assert (gpu.index, gpu.utilization, gpu.memory_bytes, gpu.power_w, gpu.temperature_c) == (1, 0.5, 1 << 30, None, 60)
    assert devices.processes_by_gpu() == {0: {41}, 1: {42}}


def test_merger_keeps_the_last_value_of_each_name_under_pressure() -> None:
    emitted: list[tuple[int | None, dict[str, float | str]]] = []
    merger = Merger(lambda at, step, values: emitted.append((step, values)))
    for step in range(1000):
        merger.add(float(step), step, {"loss": float(step)})
    merger.flush()
    assert emitted[-1] == (999, {"loss": 999.0})
    assert len(emitted) + merger.dropped >= 1000 and len(emitted) < 320


def test_merger_bounds_the_names_of_one_point_and_counts_the_rest() -> None:
    emitted: list[dict[str, float | str]] = []
    merger = Merger(lambda at, step, values: emitted.append(values))
    for number in range(200):
        merger.add(1.0, None, {f"name-{number}-{index}": 1.0 for index in range(100)})
    merger.flush()
    assert max(map(len, emitted)) <= MAX_VALUES
    assert sum(map(len, emitted)) + merger.dropped == 200 * 100


def test_halves_find_every_item_that_is_not_taken_and_use_no_number_twice() -> None:
    bad = {3, 700, 701}
    items = [Item("logs", ("att_a", 1), str(number)) for number in range(1000)]
    halves, taken, numbers = Halves(Batch("boot", 10, items)), [], [10]
    halves.rejected()
    while part := halves.next():
        numbers.append(part.seq)
        found = [int(item.text) for item in part.items]
        if bad & set(found):
            halves.rejected()
        else:
            taken += found
            halves.taken()
    assert taken == [number for number in range(1000) if number not in bad]
    assert [int(item.text) for item in halves.lost] == sorted(bad)
    assert numbers == sorted(set(numbers)) and len(numbers) < 80


def test_halves_give_up_looking_where_all_is_rejected() -> None:
    halves = Halves(Batch("boot", 1, [Item("logs", ("att_a", 1), str(number)) for number in range(20_000)]))
    halves.rejected()
    while halves.next():
        halves.rejected()
    assert len(halves.lost) == 20_000 and halves.rest().seq < 200


def test_nobody_is_a_straggler_unless_a_job_asks_for_it() -> None:
    stragglers = Stragglers(0.0)
    stragglers.begin(100.0)
    assert stragglers.look_at is None and not stragglers.is_due(1e9)
