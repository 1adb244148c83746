"""The load generators by name; ours are `native` (Triton's gRPC streams) and `engine` (the worker, no server)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import Refused
from trtbuild.perf.records import Driver, DriverName, Measured, PointSpec, Target


@dataclass(frozen=True)
class ToolPaths:
    """Where other projects' tools are; None: they are looked for."""

    perf_analyzer: Path | None = None
    aiperf: Path | None = None


class NativeDriver:
    """One process per 16 streams, each with its own connection; see `client_process`."""

    name: DriverName = "native"

    def check(self) -> None:
        if importlib.util.find_spec("tritonclient") is None or importlib.util.find_spec("grpc") is None:
            raise Refused("--driver native needs tritonclient's gRPC client: pip install 'trtbuild[serve]'")

    def check_spec(self, spec: PointSpec) -> str | None:
        return None

    def measure(self, spec: PointSpec, target: Target, raw: Path) -> Measured:
        from trtbuild.perf.client_pool import ClientPool

        with ClientPool(spec, target) as pool:
            return pool.measure()


class EngineDriver:
    """The same load on the engine worker's own socket: what a server adds is the difference to `native`."""

    name: DriverName = "engine"

    def check(self) -> None:
        return

    def check_spec(self, spec: PointSpec) -> str | None:
        return None

    def measure(self, spec: PointSpec, target: Target, raw: Path) -> Measured:
        from trtbuild.perf.client_pool import ClientPool

        with ClientPool(spec, target, engine=True) as pool:
            return pool.measure()


def make_driver(name: DriverName, tools: ToolPaths | None = None) -> Driver:
    """The driver of that name; nothing is looked for before its `check`."""
    tools = tools or ToolPaths()
    if name == "perf-analyzer":
        from trtbuild.perf.perf_analyzer import PerfAnalyzerDriver

        return PerfAnalyzerDriver(tools.perf_analyzer)
    if name == "aiperf":
        from trtbuild.perf.aiperf import AiperfDriver

        return AiperfDriver(tools.aiperf)
    return NativeDriver() if name == "native" else EngineDriver()
