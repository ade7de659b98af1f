"""What the driver says is wrong with the node's GPUs: faults (Xid), memory errors that it could not correct, heat.

Owns the asking; NVML tells of faults from the moment on at which it was first asked. Decides nothing about ranks.
Xid codes: https://docs.nvidia.com/deploy/xid-errors/
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

log = logging.getLogger("phalanx.node.gpu_faults")

_NOT_FATAL = frozenset({63, 92})  # a row was remapped; many errors that were corrected
_OF_PROGRAMS = frozenset({13, 31, 43, 45, 68, 137})  # Xids that a program's own fault raises, on a sound GPU
_MOST_EVENTS = 64  # of one look


@dataclass(frozen=True)
class GpuFault:
    """`text` follows "GPU 3 ". `is_fatal`: what runs on it is lost or wrong; else it is only slow."""

    index: int
    text: str
    is_fatal: bool


class GpuFaults:
    """Not thread-safe. Each fault is told once; heat again once the GPU has been cool."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._events, self._indices = _listen(nvml) if nvml else (None, {})
        self._lost: set[int] = set()
        self._errors: dict[int, int] = {}  # by GPU: uncorrected memory errors since the driver was loaded
        self._hot: set[int] = set()

    def read(self) -> list[GpuFault]:
        """What is new."""
        if not self._nvml:
            return []
        found = list(self._xids())
        for index in range(self._nvml.nvmlDeviceGetCount()):
            try:
                handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            except Exception:
                found += self._loss(index)
                continue
            with contextlib.suppress(Exception):  # NVML raises its own type per code; an old GPU has no such counter
                found += self._memory_errors(index, handle)
            with contextlib.suppress(Exception):
                found += self._heat(index, handle)
        return found

    def _xids(self) -> Iterator[GpuFault]:
        for _ in range(_MOST_EVENTS if self._events is not None else 0):
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except Exception:  # nothing waits: it says so by a timeout
                return
            index, xid = self._indices.get(_address(event.device)), event.eventData
            is_xid = event.eventType == self._nvml.nvmlEventTypeXidCriticalError
            if is_xid and index is not None and xid not in _OF_PROGRAMS:
                yield GpuFault(index, f"had a fault (Xid {xid})", is_fatal=xid not in _NOT_FATAL)

    def _loss(self, index: int) -> list[GpuFault]:
        """It does not answer any more, which is told once."""
        if index in self._lost:
            return []
        self._lost.add(index)
        return [GpuFault(index, "is lost: the driver does not reach it", is_fatal=True)]

    def _memory_errors(self, index: int, handle: Any) -> Iterator[GpuFault]:
        nvml = self._nvml
        errors = nvml.nvmlDeviceGetTotalEccErrors(
            handle, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
        )
        before = self._errors.setdefault(index, errors)
        self._errors[index] = errors
        if errors > before:
            yield GpuFault(index, f"had {errors - before} memory errors that could not be corrected", is_fatal=True)

    def _heat(self, index: int, handle: Any) -> Iterator[GpuFault]:
        nvml = self._nvml
        reasons = nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)
        is_hot = bool(
            reasons & (nvml.nvmlClocksEventReasonHwThermalSlowdown | nvml.nvmlClocksEventReasonSwThermalSlowdown)
        )
        if is_hot and index not in self._hot:
            yield GpuFault(index, "is slowed down by heat", is_fatal=False)
        (self._hot.add if is_hot else self._hot.discard)(index)


def _listen(nvml: Any) -> tuple[Any, dict[int | None, int]]:
    """An event set with the faults of all GPUs, None where the driver offers none; and the GPUs by their handles, for
    of one that is lost the driver does not say the index any more."""
    indices: dict[int | None, int] = {}
    try:
        events = nvml.nvmlEventSetCreate()
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            nvml.nvmlDeviceRegisterEvents(handle, nvml.nvmlEventTypeXidCriticalError, events)
            indices[_address(handle)] = index
    except Exception as error:
        log.info("the driver tells of no GPU faults: %s", error)
        return None, {}
    return events, indices


def _address(handle: Any) -> int | None:
    """What tells one handle from another: NVML's are pointers."""
    return ctypes.cast(handle, ctypes.c_void_p).value
