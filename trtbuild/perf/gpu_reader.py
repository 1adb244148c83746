"""One reading of every GPU through NVML (nvidia-ml-py), in the columns of a telemetry file.

Units are NVML's own, brought to base units: power in watts (NVML: milliwatts), energy in joules since the driver was
loaded (millijoules), memory in bytes, clocks in MHz, temperature in degrees Celsius, utilisation in per cent of NVML's
own sampling period (1/6 s to 1 s, by product). What a product does not report is left out, never zero.
Source: NVML API reference, "Device Queries"; the bits of throttle reasons are `nvmlClocksThrottleReasons` of nvml.h.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Idle, and clocks that the user set, do not slow down a busy GPU against anybody's will; they are named all the same.
THROTTLE_REASONS = {
    0x001: "idle", 0x002: "application-clocks", 0x004: "power-cap", 0x008: "hardware-slowdown", 0x010: "sync-boost",
    0x020: "thermal-software", 0x040: "thermal-hardware", 0x080: "power-brake", 0x100: "display-clocks",
    0x200: "board-limit", 0x400: "reliability",
}  # fmt: skip
SLOWING = frozenset(
    {"power-cap", "hardware-slowdown", "thermal-software", "thermal-hardware", "power-brake", "board-limit"}
)
Reading = dict[str, float | str]


class GpuReader:
    """Opens NVML; `missing` says why there is nothing to read, and is None where there is.

    `nvml` takes the place of the module pynvml.
    """

    def __init__(self, nvml: Any = None) -> None:
        self.missing: str | None = None
        self.names: list[str] = []
        self._handles: list[Any] = []
        self._nvml: Any = nvml
        self._refused: set[tuple[int, str]] = set()
        self._open()

    def _open(self) -> None:
        if self._nvml is None:
            try:
                import pynvml
            except ImportError:
                self.missing = "nvidia-ml-py is not installed (pip install 'trtbuild[gpu]'): no GPU was read"
                return
            self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
            self.names = [_text(self._nvml.nvmlDeviceGetName(handle)) for handle in self._handles]
        except self._nvml.NVMLError as error:
            self.missing = f"NVML does not answer ({error}): no GPU was read"
            return
        if not self._handles:
            self.missing = "NVML sees no GPU"

    def read(self) -> Reading:
        """Columns gpuN_QUANTITY_UNIT of every GPU; empty without one."""
        found: Reading = {}
        for index, handle in enumerate(self._handles):
            for name, ask in self._questions(handle):
                value = self._ask(index, name, ask)
                if value is not None:
                    found.update({f"gpu{index}_{column}": number for column, number in value.items()})
        return found

    def close(self) -> None:
        if self._nvml is not None and self._handles:
            self._nvml.nvmlShutdown()
        self._handles = []

    def _ask(self, index: int, name: str, ask: Callable[[], Reading]) -> Reading | None:
        """What a product has not is asked once: a refusal takes as long as an answer."""
        if (index, name) in self._refused:
            return None
        try:
            return ask()
        except self._nvml.NVMLError_NotSupported:
            self._refused.add((index, name))
        except self._nvml.NVMLError:
            # A reading that is lost is a hole in the column, no reason to lose the point.
            pass
        return None

    def _questions(self, handle: Any) -> Sequence[tuple[str, Callable[[], Reading]]]:
        nvml = self._nvml
        return (
            ("utilisation", lambda: _utilisation(nvml.nvmlDeviceGetUtilizationRates(handle))),
            ("memory", lambda: _memory(nvml.nvmlDeviceGetMemoryInfo(handle))),
            ("power", lambda: {"power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3}),
            ("sm clock", lambda: {"sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)}),
            ("memory clock", lambda: {"memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)}),
            (
                "temperature",
                lambda: {"temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)},
            ),
            (
                "throttling",
                lambda: {"throttle_reasons": throttle_names(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))},
            ),
            ("energy", lambda: {"energy_j": nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3}),
        )


def throttle_names(bits: int) -> str:
    """Reasons joined by "|", "" for none; bits without a name in nvml.h of today are given as a number."""
    names = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return "|".join([*names, *([hex(rest)] if rest else [])])


def is_slowed(reasons: str) -> bool:
    """Whether one of them slows a busy GPU down."""
    return not SLOWING.isdisjoint(reasons.split("|"))


def _utilisation(rates: Any) -> Reading:
    return {"utilization_percent": rates.gpu, "memory_utilization_percent": rates.memory}


def _memory(memory: Any) -> Reading:
    return {"memory_used_bytes": memory.used}


def _text(value: str | bytes) -> str:
    """Bytes from releases before 12."""
    return value.decode() if isinstance(value, bytes) else value
