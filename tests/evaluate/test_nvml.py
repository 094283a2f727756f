"""What the driver's library says, and that nothing breaks without it."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from autokernel.evaluate import nvml


class FakeLibrary:
    """Answers as NVML does: through pointers, with 0 for success."""

    def __init__(self, **failing: int) -> None:
        self.failing = failing
        self.open = 0

    def _put(self, name: str, pointer: Any, value: int) -> int:
        pointer._obj.value = value
        return self.failing.get(name, 0)

    def nvmlInit_v2(self) -> int:  # noqa: N802
        self.open += 1
        return self.failing.get("init", 0)

    def nvmlShutdown(self) -> int:  # noqa: N802
        self.open -= 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:  # noqa: N802
        assert uuid == b"GPU-1234"
        return self._put("uuid", handle, 7)

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        return self._put("index", handle, 8)

    def nvmlDeviceGetClockInfo(self, handle: Any, kind: Any, value: Any) -> int:  # noqa: N802
        return self._put("clock", value, {1: 1980, 2: 3201}[kind.value])

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:  # noqa: N802
        return self._put("power", value, 312_500)

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: Any, value: Any) -> int:  # noqa: N802
        return self._put("temperature", value, 41)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: Any, value: Any) -> int:  # noqa: N802
        assert isinstance(value._obj, ctypes.c_ulonglong)
        return self._put("throttle", value, 0x5)


def test_everything_in_units_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    library = FakeLibrary()
    monkeypatch.setattr(nvml, "_load", lambda: library)
    expected = {
        "clock_mhz": 1980,
        "memory_mhz": 3201,
        "power_w": 312.5,
        "temperature_c": 41,
        "throttle": 4,
    }  # idle is no reason
    assert nvml.gpu_state("1234") == nvml.gpu_state("GPU-1234") == expected
    assert library.open == 0


@pytest.mark.parametrize(("failing", "missing"), [("power", "power_w"), ("throttle", "throttle"), ("uuid", None)])
def test_what_is_not_told_is_left_out(failing: str, missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_load", lambda: FakeLibrary(**{failing: 999}))
    state = nvml.gpu_state("1234")
    assert missing not in state
    assert state["clock_mhz"] == 1980


def test_without_the_library_or_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "_load", lambda: None)
    assert nvml.gpu_state() == {}
    monkeypatch.setattr(nvml, "_load", lambda: FakeLibrary(init=9))
    assert nvml.gpu_state() == {}
    monkeypatch.setattr(nvml, "_load", lambda: FakeLibrary(uuid=9, index=9))
    assert nvml.gpu_state("1234") == {}
