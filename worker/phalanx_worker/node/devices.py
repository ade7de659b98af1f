"""What the node's processor, memory and GPUs are doing.

Owns /proc/stat, /proc/meminfo and NVML, which is used where its library and a driver are present. Figures are of the
whole node, not of an attempt. Touches no CUDA.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from phalanx_worker.node.gpu_faults import GpuFaults
from phalanx_worker.protocol import GpuStats, NodeStats

log = logging.getLogger("phalanx.node.devices")


class Devices:
    """Not thread-safe; `read` takes some milliseconds with GPUs."""

    def __init__(self, nvml: Any = None):
        self._nvml = nvml if nvml is not None else _open_nvml()
        self.faults = GpuFaults(self._nvml)
        self._last_cpu = _cpu_times()

    @property
    def gpus(self) -> int:
        return self._nvml.nvmlDeviceGetCount() if self._nvml else 0

    def read(self) -> NodeStats:
        return NodeStats(
            cpu_utilization=self._cpu_utilization(),
            memory_bytes=_used_memory_bytes(),
            gpus=[self._read_gpu(index, handle) for index, handle in self._handles()],
        )

    def processes_by_gpu(self) -> dict[int, set[int]]:
        """GPU index -> pids that compute on it, as far as NVML sees them."""
        found: dict[int, set[int]] = {}
        for index, handle in self._handles():
            with contextlib.suppress(Exception):  # NVML raises its own type per error code, all of them "not available"
                found[index] = {process.pid for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)}
        return found

    def _handles(self) -> Iterator[tuple[int, Any]]:
        """The GPUs that answer: one that fell off the bus must not hide the others."""
        for index in range(self.gpus):
            with contextlib.suppress(Exception):
                yield index, self._nvml.nvmlDeviceGetHandleByIndex(index)

    def _read_gpu(self, index: int, handle: Any) -> GpuStats:
        nvml = self._nvml
        utilization = _optional(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
        memory = _optional(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        return GpuStats(
            index=index,
            utilization=utilization or 0.0,
            memory_bytes=int(memory or 0),
            power_w=_optional(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
            temperature_c=_optional(
                lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            ),
        )

    def _cpu_utilization(self) -> float:
        busy, total = _cpu_times()
        last_busy, last_total = self._last_cpu
        self._last_cpu = (busy, total)
        return (busy - last_busy) / (total - last_total) if total > last_total else 0.0


def _open_nvml() -> Any:
    try:
        import pynvml  # absent from nodes without GPUs, where the worker still runs

        pynvml.nvmlInit()
    except Exception as error:  # ImportError, or NVMLError where there is no driver
        log.debug("no NVML: %s", error)
        return None
    return pynvml


def _optional(read: Callable[[], float]) -> float | None:
    """A figure that this GPU may not offer (NVML raises its own error for each that it does not)."""
    try:
        return read()
    except Exception:
        return None


def _cpu_times() -> tuple[int, int]:
    """(busy, total) ticks since boot."""
    with open("/proc/stat") as file:
        ticks = [int(field) for field in file.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def _used_memory_bytes() -> int:
    values: dict[str, int] = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
    return values["MemTotal"] - values["MemAvailable"]
