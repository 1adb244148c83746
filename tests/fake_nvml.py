"""Stands in for the module pynvml: raw values in NVML's own units, and a product that lacks some of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace


class NVMLError(Exception):
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801
    pass


@dataclass
class FakeNvml:
    """`energy_step` millijoules are spent with each reading of the counter."""

    names: list[str] = field(default_factory=lambda: ["NVIDIA L40S"])
    power_mw: int = 123_456
    energy_mj: int = 9_000_000_000
    energy_step: int = 1500
    reasons: int = 0x4 | 0x20
    unsupported: tuple[str, ...] = ()
    broken: bool = False
    calls: list[str] = field(default_factory=list)

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def _asked(self, name: str) -> None:
        self.calls.append(name)
        if name in self.unsupported:
            raise NVMLError_NotSupported("Not Supported")

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.calls.append("shutdown")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.names)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # noqa: N802
        return self.names[handle].encode()

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:  # noqa: N802
        self._asked("utilisation")
        return SimpleNamespace(gpu=97, memory=41)

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        self._asked("memory")
        return SimpleNamespace(total=48 << 30, used=(3 + handle) << 30, free=(45 - handle) << 30)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:  # noqa: N802
        self._asked("power")
        return self.power_mw

    def nvmlDeviceGetClockInfo(self, handle: int, kind: int) -> int:  # noqa: N802
        self._asked("clock")
        return {self.NVML_CLOCK_SM: 2520, self.NVML_CLOCK_MEM: 9001}[kind]

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:  # noqa: N802
        self._asked("temperature")
        return 61 + handle

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        self._asked("throttling")
        return self.reasons

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        self._asked("energy")
        self.energy_mj += self.energy_step
        return self.energy_mj
