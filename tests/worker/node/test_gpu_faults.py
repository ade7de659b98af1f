"""What a driver tells of faults becomes what a job's owner is told, and the end of its attempt where it says so."""

from __future__ import annotations

import types
from typing import Any

import pytest
from phalanx_worker.node.gpu_faults import GpuFault, GpuFaults
from phalanx_worker.node.watch import tell_faults
from phalanx_worker.protocol import Health


class FakeNvml:
    """Of two GPUs; what it tells is set by the test."""

    NVML_MEMORY_ERROR_TYPE_UNCORRECTED = 1
    NVML_VOLATILE_ECC = 0
    nvmlEventTypeXidCriticalError = 8
    nvmlClocksEventReasonHwThermalSlowdown = 0x40
    nvmlClocksEventReasonSwThermalSlowdown = 0x20

    def __init__(self) -> None:
        self.events: list[tuple[int, int]] = []
        self.errors = {0: 0, 1: 7}
        self.reasons = {0: 0, 1: 4}
        self.registered: list[int] = []
        self.lost: set[int] = set()

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        if index in self.lost:
            raise RuntimeError("GPU is lost")
        return index

    def nvmlEventSetCreate(self) -> str:
        return "set"

    def nvmlDeviceRegisterEvents(self, handle: int, types_: int, events: str) -> None:
        self.registered.append(handle)

    def nvmlEventSetWait_v2(self, events: str, timeout_ms: int) -> Any:
        if not self.events:
            raise TimeoutError
        device, xid = self.events.pop(0)
        return types.SimpleNamespace(device=device, eventType=8, eventData=xid)

    def nvmlDeviceGetTotalEccErrors(self, handle: int, kind: int, counter: int) -> int:
        if handle not in self.errors:
            raise RuntimeError("not supported")
        return self.errors[handle]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: int) -> int:
        return self.reasons[handle]


def test_nothing_is_told_of_sound_gpus_whatever_they_counted_before() -> None:
    nvml = FakeNvml()
    faults = GpuFaults(nvml)
    assert nvml.registered == [0, 1]
    assert faults.read() == faults.read() == []


def test_each_fault_is_told_once_and_a_programs_own_is_none() -> None:
    nvml = FakeNvml()
    faults = GpuFaults(nvml)
    faults.read()
    nvml.events = [(1, 79), (0, 31), (0, 48)]
    assert faults.read() == [GpuFault(1, "had a fault (Xid 79)", True), GpuFault(0, "had a fault (Xid 48)", True)]
    nvml.errors[1] += 2
    assert faults.read() == [GpuFault(1, "had 2 memory errors that could not be corrected", True)]
    assert faults.read() == []


def test_a_gpu_that_is_lost_is_told_once_and_hides_no_other() -> None:
    nvml = FakeNvml()
    faults = GpuFaults(nvml)
    nvml.events, nvml.lost = [(0, 48), (1, 79)], {1}
    told = [(fault.index, fault.text) for fault in faults.read()]
    assert told == [
        (0, "had a fault (Xid 48)"),
        (1, "had a fault (Xid 79)"),
        (1, "is lost: the driver does not reach it"),
    ]
    nvml.errors[0] += 1
    assert [fault.index for fault in faults.read()] == [0]


def test_a_row_that_was_remapped_is_told_and_is_not_fatal() -> None:
    nvml = FakeNvml()
    faults = GpuFaults(nvml)
    nvml.events = [(0, 63)]
    assert faults.read() == [GpuFault(0, "had a fault (Xid 63)", is_fatal=False)]


def test_heat_is_told_again_once_it_had_cooled() -> None:
    nvml = FakeNvml()
    faults = GpuFaults(nvml)
    told = []
    for reasons in (0x40, 0x60, 0x4, 0x20):
        nvml.reasons[0] = reasons
        told.append([fault.text for fault in faults.read()])
    assert told == [["is slowed down by heat"], [], [], ["is slowed down by heat"]]


def test_a_gpu_without_a_counter_and_a_node_without_a_driver_tell_what_they_can() -> None:
    nvml = FakeNvml()
    del nvml.errors[0]
    faults = GpuFaults(nvml)
    nvml.events = [(0, 79)]
    assert [fault.index for fault in faults.read()] == [0]
    assert GpuFaults(None).read() == []


@pytest.mark.asyncio(loop_scope="session")
@pytest.mark.parametrize(("action", "ends"), [("warn", False), ("restart", True), ("stop", True), ("off", False)])
async def test_the_owner_of_the_gpu_is_told_and_nobody_else(workbench: Any, action: str, ends: bool) -> None:
    attempt = await workbench.attempt("sleep 60", ranks=2, health=Health(gpu=action)).start()
    (group,) = [each for each in attempt.runners[0]._groups() if each.order.attempt_id == attempt.id]
    faults = [GpuFault(1, "had a fault (Xid 79)", True), GpuFault(0, "is slowed down by heat", False)]
    tell_faults(group, [*faults, GpuFault(5, "had a fault (Xid 79)", True)])
    if not ends:
        await attempt.runners[0].kill_group(attempt.id)
    exits = await attempt.exits()
    assert [(end["fault"], end["final"]) for end in exits] == [("health" if ends else "", action == "stop")] * 2
    assert [end["reason"] for end in exits] == ["used GPU 1, which had a fault (Xid 79)" if ends else ""] * 2
    told = [mark["data"] for mark in workbench.server.marks(attempt.id, "health")]
    assert [(data["message"], data["action"]) for data in told] == (
        []
        if action == "off"
        else [
            ("GPU 1 of node-0 had a fault (Xid 79)", action),
            ("GPU 0 of node-0 is slowed down by heat", "warn"),
        ]
    )
