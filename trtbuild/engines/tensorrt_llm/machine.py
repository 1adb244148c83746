"""Whether this machine can build a recipe's engines: release, TensorRT, driver and GPUs, before a byte is converted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.checkpoints.precision import Precision
from trtbuild.containers import Installed, container_for, find_installed
from trtbuild.errors import refuse_all

if TYPE_CHECKING:
    from trtbuild.engines.device.gpu import Gpu

# The releases whose trtllm-build this is written for: the last three that have one.
RELEASES = ("1.0", "1.1", "1.2")
# What a dry run takes where nothing is installed.
ASSUMED_RELEASE = "1.2.1"
_MIN_SM, _MIN_SM_FP8 = 80, 89
# Data-centre Blackwell, for which 1.x has no integer weights and no scales for single rows.
_NO_INTEGERS = range(100, 120)


@dataclass(frozen=True)
class BuildMachine:
    """What engines would be built with."""

    installed: Installed
    gpus: Sequence[Gpu]

    @property
    def sm(self) -> int | None:
        return int(self.gpus[0].target[2:]) if self.gpus else None

    @property
    def release(self) -> str:
        """Installed, or what a dry run assumes."""
        return self.installed.tensorrt_llm or ASSUMED_RELEASE


def this_machine() -> BuildMachine:
    from trtbuild.engines.device.gpu import find_gpus

    return BuildMachine(find_installed(), find_gpus())


def check_machine(machine: BuildMachine, precision: Precision, target: Sequence[str]) -> None:
    """Raises Refused with everything that stands in the way, and the container that would do."""
    refuse_all("--builder tensorrt-llm cannot build here", _problems(machine, precision, target))


def _problems(machine: BuildMachine, precision: Precision, target: Sequence[str]) -> Iterator[str]:
    yield from _release_problems(machine.installed)
    if not machine.gpus:
        yield "no GPU: trtllm-build times kernels on the GPU that the engine is for (--dry-run prints what it would do)"
        return
    models = {gpu.target: gpu.name for gpu in machine.gpus}
    if len(models) > 1:
        found = ", ".join(f"{name} ({sm})" for sm, name in models.items())
        yield f"GPUs of several kinds, {found}: name those of one kind in CUDA_VISIBLE_DEVICES"
    if len(target) == 1 and target[0] not in models:
        yield f"--target {target[0]}: the GPU here is {machine.gpus[0].target} ({machine.gpus[0].name})"
    container = machine.installed.container or container_for(machine.release)
    problem = container.driver_problem(machine.gpus[0].driver) if container else None
    if problem is not None:
        yield problem
    yield from gpu_problems(int(machine.gpus[0].target[2:]), precision)


def _release_problems(installed: Installed) -> Iterator[str]:
    newest = container_for(ASSUMED_RELEASE)
    place = f"; work in {newest.image}" if newest else ""
    version = installed.tensorrt_llm
    if version is None:
        yield f"tensorrt_llm is not installed{place} (--dry-run prints what it would do)"
    elif not version.startswith(tuple(f"{release}." for release in RELEASES)):
        later = version.split(".")[0].isdecimal() and tuple(map(int, version.split(".")[:2])) >= (1, 3)
        why = (
            "has no engines any more: trtbuild package --llmapi serves its PyTorch backend"
            if later
            else f"is older than {RELEASES[0]}, whose flags differ"
        )
        yield f"TensorRT-LLM {version} {why}{place}"
    elif not _expected_tensorrt(installed):
        expected = container_for(version)
        yield (
            f"TensorRT {installed.tensorrt} is installed, and TensorRT-LLM {version} is made for "
            f"{expected.tensorrt if expected else 'another'}; plans of one do not load in the other{place}"
        )


def _expected_tensorrt(installed: Installed) -> bool:
    container = container_for(installed.tensorrt_llm or "")
    if installed.tensorrt is None or container is None or container.tensorrt is None:
        return True
    return installed.tensorrt.split(".")[:2] == container.tensorrt.split(".")[:2]


def target_problems(target: Sequence[str]) -> Iterator[str]:
    if len(target) > 1:
        yield f"--target {','.join(target)}: an engine is for one compute capability, that of the GPU that builds it"


def gpu_problems(sm: int, precision: Precision) -> Iterator[str]:
    """What this compute capability lacks for a precision."""
    if sm < _MIN_SM:
        yield f"sm{sm}: TensorRT-LLM 1.x supports sm{_MIN_SM} and later; use --builder tensorrt-rtx"
    if sm < _MIN_SM_FP8 and (precision.weights in ("fp8", "fp8-dynamic") or precision.fp8_cache):
        yield f"sm{sm} has no fp8 (sm{_MIN_SM_FP8} and later have)"
    has_integers = precision.weights.startswith("int") or precision.group_size is not None
    if sm in _NO_INTEGERS and (has_integers or precision.weights == "fp8-dynamic"):
        yield f"sm{sm}: TensorRT-LLM 1.x has no {precision.weights} for it; use --precision fp8"
