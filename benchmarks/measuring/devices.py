"""Measure the memory and time of a run, on the CPU or on an accelerator."""

import gc
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from actctx._results.joining import give_back_to_system

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")


class Meter(Protocol):
    """Measures runs on one device."""

    def peak_of(self, run: Callable[[], T]) -> tuple[T, int | None]:
        """Run, and return the peak in bytes above the memory before; None if unknown."""

    def seconds_of(self, run: Callable[[], object]) -> float:
        """Run, and return the time in seconds."""

    def capacity(self) -> int | None:
        """Return the device's memory in bytes; None if unknown."""


class Cpu:
    """Reads the resident memory of the process, and the clock."""

    def peak_of(self, run: Callable[[], T]) -> tuple[T, int | None]:
        """See `Meter`; the kernel keeps the exact peak from a reset on."""
        gc.collect()
        try:
            _CLEAR_REFS.write_text("5")
        except OSError:
            return run(), None
        before = _status_bytes("VmRSS")
        found = run()
        peak = _status_bytes("VmHWM")
        return found, None if before is None or peak is None else peak - before

    def seconds_of(self, run: Callable[[], object]) -> float:
        """See `Meter`; nothing of the previous run remains, not even in the allocator."""
        gc.collect()
        give_back_to_system()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def capacity(self) -> int | None:
        """See `Meter`."""
        return _meminfo_bytes("MemTotal")


class Accelerator:
    """Reads the counts of an accelerator's allocator, and the time between two events.

    Args:
        device: The device, such as `cuda:0`.
        library: torch's module of such devices, such as `torch.cuda`.

    """

    def __init__(self, device: torch.device, library: Any) -> None:
        self._device, self._library = device, library

    def peak_of(self, run: Callable[[], T]) -> tuple[T, int | None]:
        """See `Meter`."""
        gc.collect()
        self._library.synchronize(self._device)
        self._library.reset_peak_memory_stats(self._device)
        before = self._library.memory_allocated(self._device)
        found = run()
        self._library.synchronize(self._device)
        return found, self._library.max_memory_allocated(self._device) - before

    def seconds_of(self, run: Callable[[], object]) -> float:
        """See `Meter`; from the start to the end of the run on the device."""
        gc.collect()
        with self._library.device(self._device):  # events are recorded on its stream
            start, end = (self._library.Event(enable_timing=True) for _ in range(2))
            self._library.synchronize()
            start.record()
            run()
            end.record()
            self._library.synchronize()
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000

    def capacity(self) -> int | None:
        """See `Meter`."""
        total: int = self._library.mem_get_info(self._device)[1]
        return total


def meter_of(device: str) -> Meter:
    """Choose the meter of a device.

    Raises:
        RuntimeError: torch does not know the device, finds none on this machine, or cannot
            report its peak memory.

    """
    chosen = torch.device(device)
    if chosen.type == "cpu":
        return Cpu()
    library = torch.get_device_module(chosen)
    if not library.is_available():
        raise RuntimeError(f"torch finds no {chosen.type} device on this machine")
    if not hasattr(library, "max_memory_allocated"):
        raise RuntimeError(f"torch does not report the peak memory of {chosen.type} devices")
    return Accelerator(chosen, library)


def limit_memory(share: int) -> None:
    """Make torch refuse allocations that exceed the machine's memory, instead of being killed.

    Args:
        share: The number of processes that share the memory.

    """
    available, held = _meminfo_bytes("MemAvailable"), _status_bytes("VmData")
    if available is None or held is None:
        return
    import resource

    most = held + int(available * 0.95 / share)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _status_bytes(field: str) -> int | None:
    """Read one of the sizes that the kernel reports for this process."""
    return _bytes(_STATUS, field)


def _meminfo_bytes(field: str) -> int | None:
    return _bytes(_MEMINFO, field)


def _bytes(path: Path, field: str) -> int | None:
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
