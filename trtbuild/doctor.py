"""`trtbuild doctor`: what works on this machine, what is missing, and the command that would bring it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

import trtbuild
from trtbuild.errors import Refused

Status = Literal["ok", "missing", "info"]
RTX_COMMAND = "pip install 'trtbuild[rtx]'"
# NGC's container as it is has no trtbuild.
_IMAGE_COMMAND = (
    f"docker build -f build/Dockerfile -t trtbuild-trtllm:{trtbuild.__version__} .  # in trtbuild's repository"
)
_MARKS = {"ok": "[green]ok     [/]", "missing": "[yellow]missing[/]", "info": "[blue]note   [/]"}


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `fix` says how to bring what is missing."""

    subject: str
    status: Status
    detail: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Look at the machine; changes nothing, starts nothing that stays."""
    return [
        _machine(),
        _torch(),
        *_gpus(),
        _tensorrt_rtx(),
        _tensorrt_llm(),
        _triton(),
        _perf_analyzer(),
        _aiperf(),
        *_abilities(),
    ]


def print_findings(findings: list[Finding]) -> None:
    console = Console()
    for finding in findings:
        console.print(
            f"{_MARKS[finding.status]} {finding.subject:16} {escape(finding.detail)}", highlight=False, soft_wrap=True
        )
        if finding.fix:
            console.print(f"{'':8}{'':16} to get it: {escape(finding.fix)}", highlight=False, soft_wrap=True)


def _machine() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    detail = (
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {os.cpu_count()} cores, "
        f"{memory.total / 2**30:.0f} GiB memory ({memory.available / 2**30:.0f} free)"
    )
    return Finding("machine", "ok", detail)


def _torch() -> Finding:
    import torch

    device = f"CUDA {torch.version.cuda}" if torch.cuda.is_available() else "CPU only"
    return Finding("torch", "ok", f"{torch.__version__}, {device}: runs the reference executor")


def _gpus() -> list[Finding]:
    """Through NVML, which needs the driver but neither CUDA nor torch."""
    try:
        import pynvml
    except ImportError:
        return [
            Finding(
                "GPU",
                "missing",
                "nvidia-ml-py is not installed, so GPUs were not looked for",
                "pip install 'trtbuild[gpu]'",
            )
        ]
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [Finding("GPU", "missing", f"no NVIDIA driver answers ({error}); engines compile here all the same")]
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _driver() -> str | None:
    """Version of the NVIDIA driver; None where none answers, or nobody can ask."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlSystemGetDriverVersion()
    finally:
        pynvml.nvmlShutdown()


def _gpu(pynvml: Any, index: int, driver: str) -> Finding:
    from trtbuild.engines.tensorrt.targets import TARGETS

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    target = f"sm{major}{minor}"
    name = pynvml.nvmlDeviceGetName(handle)
    known = "" if target in TARGETS else "; TensorRT-RTX has no target for it"
    return Finding(f"GPU {index}", "ok", f"{name}, {target}, {memory.total / 2**30:.0f} GiB, driver {driver}{known}")


def _tensorrt_rtx() -> Finding:
    try:
        import tensorrt_rtx
    except ImportError as error:
        return Finding("TensorRT-RTX", "missing", f"the default builder cannot run ({error})", RTX_COMMAND)
    return Finding("TensorRT-RTX", "ok", f"{tensorrt_rtx.__version__}: compiles engines, with or without a GPU")


def _tensorrt_llm() -> Finding:
    """Which release, which of NGC's containers that is, and whether the driver is new enough for it."""
    from trtbuild.containers import container_for, containers_with, find_installed

    here = find_installed()
    if here.tensorrt_llm is None:
        newest = container_for("1.2.1")
        detail = "not installed: --builder tensorrt-llm can plan (--dry-run) but not build here"
        detail += f"; its container is {newest.image}" if newest else ""
        return Finding("TensorRT-LLM", "info", detail, _IMAGE_COMMAND)
    container = here.container or container_for(here.tensorrt_llm)
    tensorrt = f", TensorRT {here.tensorrt}" if here.tensorrt else ""
    detail = f"{here.tensorrt_llm}{tensorrt}"
    if container is None:
        known = ", ".join(dict.fromkeys(one.tensorrt_llm for one in containers_with(tensorrt_llm="1")))
        return Finding("TensorRT-LLM", "info", f"{detail}: no NGC container has this release; they have {known}")
    detail += f": {'in' if here.container else 'its container is'} {container.describe()}"
    driver = _driver()
    problem = container.driver_problem(driver) if driver else None
    if problem is not None:
        return Finding("TensorRT-LLM", "missing", f"{detail}; {problem}")
    if not _has_cuda_gpu():
        return Finding("TensorRT-LLM", "info", f"{detail}; no GPU: it can plan (--dry-run) but not build here")
    return Finding("TensorRT-LLM", "ok", detail + (f"; driver {driver}" if driver else ""))


def _has_cuda_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _triton() -> Finding:
    from trtbuild.triton_repo.installation import PYTRITON_COMMAND, find_triton

    try:
        found = find_triton()
    except Refused as error:
        return Finding("Triton", "missing", f"trtbuild serve cannot run ({_reason(error)})", PYTRITON_COMMAND)
    return Finding("Triton", "ok", f"{found.binary} ({found.source}): serves engines")


def _perf_analyzer() -> Finding:
    from trtbuild.perf.perf_analyzer_binary import COMMAND, find_perf_analyzer

    try:
        found = find_perf_analyzer()
    except Refused as error:
        missing = error.message.startswith("no perf_analyzer")
        fix = COMMAND if missing else ""
        return Finding("perf_analyzer", "info", f"--driver native measures without it ({_reason(error)})", fix)
    return Finding("perf_analyzer", "ok", f"{found.version}, {found.binary}: --driver perf-analyzer measures with it")


def _aiperf() -> Finding:
    from trtbuild.perf.aiperf import COMMAND, find_aiperf

    try:
        found = find_aiperf()
    except Refused as error:
        return Finding("AIPerf", "info", f"--driver native measures without it ({_reason(error)})", COMMAND)
    return Finding("AIPerf", "ok", f"{found.version}, {found.binary}: --driver aiperf measures with it")


def _reason(error: Refused) -> str:
    """Without the command, which has a line of its own."""
    return error.message.partition(". ")[0]


def _abilities() -> list[Finding]:
    """What follows, in the user's words."""
    can_compile = _installed("tensorrt-rtx-cu12") is not None
    return [
        Finding(
            "compile",
            "ok" if can_compile else "missing",
            "trtbuild compile" + ("" if can_compile else " needs TensorRT-RTX"),
        ),
        _run_engines(),
    ]


def _run_engines() -> Finding:
    """Which executor `trtbuild generate` takes here, for an engine that was compiled for everything."""
    import torch

    from trtbuild.engines.tensorrt.targets import TARGETS

    reference = "by the reference executor (PyTorch)"
    if not torch.cuda.is_available():
        return Finding("run", "ok", f"trtbuild generate, {reference}: torch sees no CUDA GPU to run TensorRT plans on")
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    targets = [f"sm{major}{minor}" for major, minor in found]
    able = [target for target in targets if target in TARGETS]
    if not able:
        detail = f"trtbuild generate, {reference}: TensorRT-RTX has no target {', '.join(dict.fromkeys(targets))}"
        return Finding("run", "ok", f"{detail}, only {', '.join(TARGETS)}")
    if _installed("tensorrt-rtx-cu12") is None:
        return Finding("run", "info", f"trtbuild generate, {reference}; TensorRT-RTX would run the plans", RTX_COMMAND)
    many = "" if len(able) == 1 else f", up to {len(able)} tensor-parallel ranks"
    return Finding("run", "ok", f"trtbuild generate, by the TensorRT executor on {', '.join(able)}{many}")


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
