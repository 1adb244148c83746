"""`compile --builder tensorrt-llm --dry-run`: the exact files and commands, with nothing installed or written."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, rank_file
from trtbuild.checkpoints.tensorrt_llm_config import quantization_section
from trtbuild.containers import container_for
from trtbuild.engines.passport import PASSPORT
from trtbuild.engines.tensorrt_llm.builder import TrtllmJob
from trtbuild.engines.tensorrt_llm.engine_config import ENGINE_CONFIG, engine_file
from trtbuild.engines.tensorrt_llm.flags import arguments
from trtbuild.engines.tensorrt_llm.rank_processes import rank_command
from trtbuild.units import format_bytes
from trtbuild.workspace import Workspace

# The commands are meant to be given in the workspace, whatever its path.
_ROOT = Workspace(Path())
_LINE = 80


def dry_run(resolved: TrtllmJob) -> str:
    """A text to read, whose commands a shell runs; lines that begin with # are about them."""
    return "\n".join([*_header(resolved), "", *_checkpoint(resolved), "", *_engine(resolved)])


def dry_run_facts(resolved: TrtllmJob) -> dict[str, Any]:
    """The same for a program."""
    job = resolved.job
    return {
        "release": resolved.machine.release,
        "installed": resolved.machine.installed.tensorrt_llm is not None,
        "checkpoint": {
            "directory": str(_ROOT.build / job.recipe.engine_name),
            "quantization": quantization_section(job.config, job.layout, job.precision),
            "ranks": [sum(spec.num_bytes for spec in plan.tensors()) for plan in job.plans],
        },
        "engine": str(_ROOT.engines / job.recipe.engine_name),
        "flags": dict(resolved.flags),
        "commands": [["python", *command] for command in _commands(resolved)],
    }


def _header(resolved: TrtllmJob) -> Iterator[str]:
    machine, release = resolved.machine, resolved.machine.release
    yield f"# {resolved.job.recipe.command()} --dry-run"
    if machine.installed.tensorrt_llm is None:
        container = container_for(release)
        place = f"; its container is {container.image}" if container else ""
        yield f"# TensorRT-LLM {release} is assumed, and not installed here{place}"
    else:
        tensorrt = machine.installed.tensorrt
        yield f"# TensorRT-LLM {release}" + (f", TensorRT {tensorrt}" if tensorrt else "")
    gpu = (
        f"{len(machine.gpus)} x {machine.gpus[0].name}"
        if machine.gpus
        else "none here; the engines will be for the GPU"
    )
    yield f"# GPU: {gpu}{'' if machine.gpus else ' that builds them'}"


def _checkpoint(resolved: TrtllmJob) -> Iterator[str]:
    job = resolved.job
    config = job.config
    mixture = f", {config.moe.num_experts} experts" if config.moe else ""
    yield f"# 1. The rank checkpoint {_ROOT.build / job.recipe.engine_name}/"
    yield f"#    {config.architecture}, {config.num_layers} layers{mixture}; {_layout(resolved)}"
    section = {
        k: v for k, v in quantization_section(config, job.layout, job.precision).items() if v not in (None, False)
    }
    yield f"#    config.json: quantization {json.dumps(section)}"
    if job.precision.is_deferred:
        yield f"#    its linear layers are {job.precision.dtype}: trtllm-build quantizes them ({section['quant_algo']})"
    for rank, plan in enumerate(job.plans):
        tensors = plan.tensors()
        size = format_bytes(sum(spec.num_bytes for spec in tensors))
        yield f"#    {rank_file(rank)}: {len(tensors)} tensors, {size}, decoder layers {_span(plan.layers)}"
    yield f"#    {AUTHORITY}: the precision and the digest of every tensor"


def _engine(resolved: TrtllmJob) -> Iterator[str]:
    job, world = resolved.job, resolved.job.layout.world_size
    place = _ROOT.engines
    together = "one process for each rank, as many at once as there are GPUs" if world > 1 else "one process"
    yield f"# 2. trtllm-build, {together}; a rank that is done is not built again"
    shared = {**_paths(resolved), **resolved.flags}
    yield f'FLAGS="{_wrapped(arguments(shared))}"'
    for rank in range(world):
        words = rank_command(rank, {"output_dir": _output(resolved, rank)})
        command = f"python {shlex.join(words[:3])} $FLAGS {shlex.join(words[3:])}"
        yield f"CUDA_VISIBLE_DEVICES={rank % _num_gpus(resolved)} {command}"
    yield "#    By hand, all ranks in one (and from the beginning again when one fails):"
    workers = min(world, _num_gpus(resolved))
    yield f"#    trtllm-build $FLAGS --output_dir {place / job.recipe.engine_name} --workers {workers}"
    yield ""
    yield f"# 3. The engine {place / job.recipe.engine_name}/"
    names = [engine_file(rank) for rank in range(world)]
    yield f"#    {', '.join(names)}, {ENGINE_CONFIG}: checked against every flag above"
    yield f"#    {PASSPORT}: the passport; tokenizer/, model_card/"


def _commands(resolved: TrtllmJob) -> list[list[str]]:
    shared = {**_paths(resolved), **resolved.flags}
    ranks = range(resolved.job.layout.world_size)
    return [rank_command(rank, {**shared, "output_dir": _output(resolved, rank)}) for rank in ranks]


def _output(resolved: TrtllmJob, rank: int) -> str:
    return str(_ROOT.engines / f".{resolved.job.recipe.engine_name}.partial" / f"rank{rank}.partial")


def _paths(resolved: TrtllmJob) -> dict[str, Any]:
    return resolved.paths(_ROOT, _ROOT.build / resolved.job.recipe.engine_name)


def _num_gpus(resolved: TrtllmJob) -> int:
    return len(resolved.machine.gpus) or resolved.job.layout.world_size


def _layout(resolved: TrtllmJob) -> str:
    layout = resolved.job.layout
    text = f"tp {layout.tp}, pp {layout.pp}"
    return text + (f", moe-tp {layout.moe_tp}, moe-ep {layout.moe_ep}" if resolved.job.config.moe else "")


def _span(layers: range) -> str:
    return f"{layers.start} to {layers.stop - 1}"


def _wrapped(words: Sequence[str]) -> str:
    """As many flags on a line as one can read."""
    lines = [""]
    for word in words:
        if word.startswith("--") and len(lines[-1]) > _LINE:
            lines.append("")
        lines[-1] += f" {shlex.quote(word)}" if lines[-1] else shlex.quote(word)
    return "\n       ".join(lines)
