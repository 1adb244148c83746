"""What must be here before ranks are started: a Triton with TensorRT-LLM's backend, the launcher, the right release."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trtbuild.containers import Installed, container_for, find_installed, mismatch
from trtbuild.engines.passport import PASSPORT
from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.installation import TritonInstallation, find_triton
from trtbuild.triton_repo.tensorrt_llm.hostfile import is_this_machine
from trtbuild.triton_repo.tensorrt_llm.launch import CONTAINER_BINARY, LaunchPlan
from trtbuild.triton_repo.tensorrt_llm.served_models import BACKEND, TrtllmModel
from trtbuild.workspace import read_json

# Slurm sets it on the nodes of an allocation, from 0.
_SLURM_NODE = "SLURM_NODEID"


def find_server(given: Path | None, models: Sequence[TrtllmModel], *, dry_run: bool) -> TritonInstallation:
    """A Triton with TensorRT-LLM's backend; for `dry_run` `given`, or where NGC's container has it."""
    if dry_run:
        return TritonInstallation(given or CONTAINER_BINARY, "dry run")
    try:
        found = find_triton(given)
    except Refused:
        if given is not None:
            raise
        raise Refused(_where_to_serve("no Triton server with TensorRT-LLM here", models)) from None
    if found.backends is not None:
        # nvidia-pytriton's has no backend but Python's.
        raise Refused(_where_to_serve(f"{found.source}'s Triton cannot run TensorRT-LLM engines", models))
    backends = found.binary.resolve().parent.parent / "backends"
    if backends.is_dir() and not (backends / BACKEND).is_dir():
        raise Refused(_where_to_serve(f"{backends} has no backend {BACKEND!r}", models))
    return found


def check_here(plan: LaunchPlan, models: Sequence[TrtllmModel], installed: Installed | None = None) -> None:
    """Raises `Refused` where this machine cannot start the plan, or has another release than the engines'."""
    refuse_all("serve", [*_launcher_problems(plan), *version_problems(models, installed or find_installed())])


def count_gpus() -> int | None:
    """GPUs that a process of this machine would see; None where nobody can say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for one in visible.split(",") if one.strip())
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return pynvml.nvmlDeviceGetCount()
    finally:
        pynvml.nvmlShutdown()


def version_problems(models: Sequence[TrtllmModel], installed: Installed) -> Iterator[str]:
    """Engines that this TensorRT-LLM cannot load, with the container that can."""
    for one in models:
        passport = one.engine.directory / PASSPORT
        data = read_json(passport) if passport.is_file() else {}
        problem = mismatch(
            one.engine.version, installed,
            engine_tensorrt=(data.get("builder") or {}).get("tensorrt"), rebuild=data.get("rebuild", ""),
        )  # fmt: skip
        if problem is not None:
            yield f"{one.name}: {problem}"


def _launcher_problems(plan: LaunchPlan) -> Iterator[str]:
    if plan.launcher and shutil.which(plan.launcher[0]) is None:
        yield f"{plan.launcher[0]} is not on PATH; NGC's container has Open MPI, a Slurm cluster has srun"
    if plan.uses_srun and os.environ.get(_SLURM_NODE) != "0":
        yield (
            "--launcher srun works on the first node of a Slurm allocation, where rank 0 will listen; here "
            f"{_SLURM_NODE} is {os.environ.get(_SLURM_NODE) or 'not set'}: put trtbuild serve into an sbatch script, "
            "or into salloc's shell on that node"
        )
    if plan.hosts and not is_this_machine(plan.hosts[0].name):
        yield (
            f"the hostfile's first host is {plan.hosts[0].name}, where rank 0 will listen; run trtbuild serve there, "
            "or put this machine first"
        )


def _where_to_serve(problem: str, models: Sequence[TrtllmModel]) -> str:
    versions = dict.fromkeys(one.engine.version for one in models if one.engine.version)
    images = [found.image for found in map(container_for, versions) if found is not None]
    where = " or ".join(images) or "the container in which the engine was built"
    return f"{problem}: serve in {where}; --dry-run prints the command"
