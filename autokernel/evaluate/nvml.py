"""A GPU's clocks, power and temperature from the driver's own library (NVML), by ctypes: no package is needed for it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# The driver's folder is on the loader's path as a rule; in containers it may only be mounted.
_LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1", "/usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1")
_SUCCESS = 0
_SM_CLOCK, _MEMORY_CLOCK = 1, 2  # nvmlClockType_t
_GPU_TEMPERATURE = 0  # nvmlTemperatureSensors_t
_IDLE = 0x1  # of the throttle reasons: nothing to do is no reason to worry


def gpu_state(uuid: str = "") -> dict[str, float]:
    """A GPU's `clock_mhz` (multiprocessors), `memory_mhz`, `power_w`, `temperature_c` and `throttle` (a mask of reasons) now.

    What the driver does not tell is left out; without NVML that is everything.

    Args:
        uuid: which GPU, with or without "GPU-"; default: the first.
    """
    with _opened() as library:
        handle = None if library is None else _handle(library, uuid)
        if library is None or handle is None:
            return {}
        reads: dict[str, tuple[Callable[[], float | None], float]] = {
            "clock_mhz": (lambda: _number(library, "nvmlDeviceGetClockInfo", handle, _SM_CLOCK), 1),
            "memory_mhz": (lambda: _number(library, "nvmlDeviceGetClockInfo", handle, _MEMORY_CLOCK), 1),
            "power_w": (lambda: _number(library, "nvmlDeviceGetPowerUsage", handle), 1e-3),
            "temperature_c": (lambda: _number(library, "nvmlDeviceGetTemperature", handle, _GPU_TEMPERATURE), 1),
        }
        state = {name: value * unit for name, (read, unit) in reads.items() if (value := read()) is not None}
        reasons = _throttle_reasons(library, handle)
        if reasons is not None:
            state["throttle"] = float(reasons & ~_IDLE)
        return state


@contextmanager
def _opened() -> Iterator[ctypes.CDLL | None]:
    """The library, initialised; None where there is none."""
    library = _load()
    if library is None or library.nvmlInit_v2() != _SUCCESS:
        yield None
        return
    try:
        yield library
    finally:
        library.nvmlShutdown()


def _load() -> ctypes.CDLL | None:
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def _handle(library: ctypes.CDLL, uuid: str) -> ctypes.c_void_p | None:
    handle = ctypes.c_void_p()
    name = uuid if not uuid or uuid.startswith("GPU-") else f"GPU-{uuid}"
    if name and library.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle)) == _SUCCESS:
        return handle
    if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), ctypes.byref(handle)) == _SUCCESS:
        return handle
    return None


def _number(library: ctypes.CDLL, function: str, handle: ctypes.c_void_p, *arguments: int) -> float | None:
    value = ctypes.c_uint()
    code = getattr(library, function)(handle, *map(ctypes.c_int, arguments), ctypes.byref(value))
    return float(value.value) if code == _SUCCESS else None


def _throttle_reasons(library: ctypes.CDLL, handle: ctypes.c_void_p) -> int | None:
    value = ctypes.c_ulonglong()
    for name in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):
        try:
            function = getattr(library, name)
        except AttributeError:  # the name changed with driver 535
            continue
        if function(handle, ctypes.byref(value)) == _SUCCESS:
            return int(value.value)
    return None
