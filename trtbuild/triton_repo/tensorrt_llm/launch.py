"""The command that serves TensorRT-LLM engines: a tritonserver for each rank, in one MPI world.

Three ways, as TensorRT-LLM's own launcher has them. Leader mode: rank 0 answers, the others load only the engine and
work for it; a single rank needs no MPI. Orchestrator mode (`multi_model`), for several engines on one node: one server,
whose backend spawns the ranks of every engine. And orchestrator mode without spawning: rank 0 is the orchestrator, and
every model says in `participant_ids` which of the other ranks are its own.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trtbuild.containers import release_of
from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.tensorrt_llm.hostfile import Host, host_problems, ranks_text, read_hostfile
from trtbuild.triton_repo.tensorrt_llm.served_models import TrtllmModel
from trtbuild.triton_repo.triton_process import Ports

Launcher = Literal["mpirun", "srun"]
CONTAINER_BINARY = Path("/opt/tritonserver/bin/tritonserver")
# What ranks on other machines need of this one's environment; ssh brings nothing.
_EXPORTED = re.compile(r"PATH|LD_LIBRARY_PATH|PYTHONPATH|CUDA_VISIBLE_DEVICES|(?:TRTLLM|TLLM|NCCL|UCX|HF)_\w+")


@dataclass(frozen=True)
class LaunchOptions:
    """How ranks are started; `spawn` is of `multi_model` only. `arguments` go to the launcher."""

    launcher: Launcher = "mpirun"
    hostfile: Path | None = None
    multi_model: bool = False
    spawn: bool = True
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServerOptions:
    """Of tritonserver itself; `names`: the models that rank 0 loads, all of the repository where empty."""

    repository: Path
    binary: Path = CONTAINER_BINARY
    ports: Ports = field(default_factory=Ports)
    names: tuple[str, ...] = ()
    exit_timeout_s: int = 30
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class LaunchPlan:
    """What will be run: `launcher` without the ranks, empty for one rank without MPI; each rank's command line."""

    launcher: tuple[str, ...]
    ranks: tuple[tuple[str, ...], ...]
    environment: dict[str, str] = field(default_factory=dict)
    exported: tuple[str, ...] = ()
    hosts: tuple[Host, ...] = ()

    @property
    def uses_srun(self) -> bool:
        return self.launcher[:1] == ("srun",)

    def command(self) -> list[str]:
        """The argument list to run."""
        if not self.launcher:
            return list(self.ranks[0])
        if self.uses_srun:
            return [*self.launcher, "bash", "-c", self._script()]
        return [*self.launcher, *_joined([self._context(rank) for rank in self.ranks], ":")]

    def text(self) -> str:
        """The same for a shell, one group of arguments a line."""
        groups: list[Sequence[str]] = [[f"{name}={value}" for name, value in self.environment.items()]]
        if not self.launcher:
            groups.append(self.ranks[0])
        elif self.uses_srun:
            groups.append([*self.launcher, "bash", "-c", self._script()])
        else:
            contexts = [self._context(rank) for rank in self.ranks]
            groups += [self.launcher, *([*one, ":"] for one in contexts[:-1]), contexts[-1]]
        return " \\\n".join(shlex.join(group) for group in groups if group)

    def _context(self, rank: Sequence[str]) -> list[str]:
        """Open MPI's app context; -x holds only for the context that it stands in."""
        return ["-n", "1", *(part for name in self.exported for part in ("-x", name)), *rank]

    def _script(self) -> str:
        """srun starts one command line for all ranks."""
        cases = [f"{number}) exec {shlex.join(rank)} ;;" for number, rank in enumerate(self.ranks)]
        return "\n".join(['case "$SLURM_PROCID" in', *cases, "esac"])


def plan_launch(
    models: Sequence[TrtllmModel],
    server: ServerOptions,
    options: LaunchOptions,
    *,
    environment: Mapping[str, str] | None = None,
    num_gpus: int | None = None,
) -> LaunchPlan:
    """The processes that serve `models`; nothing is started, and nothing need be installed.

    `num_gpus`: GPUs of this node, of which an orchestrator keeps off; by default those that the models use.
    Raises `Refused` listing everything in the repository, the hostfile and the options that does not agree.
    """
    hosts = read_hostfile(options.hostfile) if options.hostfile is not None else ()
    refuse_all("serve", [*_option_problems(models, options), *_model_problems(models, options)])
    world_size = _world_size(models, options)
    refuse_all("serve", _place_problems(models, options, hosts, world_size))
    extra = _orchestrator_arguments(models, num_gpus) if options.multi_model and options.spawn else []
    ranks = [_rank(rank, models, server, extra) for rank in range(world_size)]
    exported = _exported(os.environ if environment is None else environment) if hosts else []
    added = _environment(options)
    return LaunchPlan(
        tuple(_launcher(models, options, world_size)), tuple(tuple(rank) for rank in ranks), added,
        (*exported, *(added if hosts else ())), hosts,
    )  # fmt: skip


def _option_problems(models: Sequence[TrtllmModel], options: LaunchOptions) -> list[str]:
    problems: list[str] = []
    if not options.spawn and not options.multi_model:
        problems.append("--disable-spawn-processes goes with --multi-model")
    if options.launcher == "srun" and options.hostfile is not None:
        problems.append("--hostfile is mpirun's; Slurm's allocation says which nodes srun uses")
    if options.multi_model and options.spawn:
        fix = "add --disable-spawn-processes, and participant_ids to every model"
        if options.hostfile is not None:
            problems.append(f"--multi-model spawns ranks on this node only, --hostfile has several; {fix}")
        if options.launcher == "srun":
            problems.append(f"--multi-model spawns ranks by MPI_Comm_spawn, which is not for Slurm; {fix}")
    several = [one for one in models if one.world_size > 1]
    if len(models) > 1 and several and not options.multi_model:
        names = ", ".join(f"{one.name} ({ranks_text(one.world_size)})" for one in models)
        problems.append(f"several engines in one server, {names}: add --multi-model, or name the one to serve")
    releases = {release_of(one.engine.version) for one in models if one.engine.version}
    if len(releases) > 1:
        names = ", ".join(f"{one.name} ({one.engine.version})" for one in models)
        problems.append(
            f"engines of several releases, {names}: a server has one TensorRT-LLM; serve them apart by name, each in "
            "its container, or build them again with one release"
        )
    return problems


def launch_warnings(models: Sequence[TrtllmModel], options: LaunchOptions) -> list[str]:
    """What may be meant, and seldom is."""
    unplaced = [one.name for one in models if not one.gpu_device_ids]
    if not options.multi_model or len(models) < 2 or not unplaced:
        return []
    return [
        f"{', '.join(unplaced)}: no gpu_device_ids, so each of these takes GPUs from 0 on, beside the others; "
        "trtbuild package NAME --trtllm gpu_device_ids=0,1 says which"
    ]


def _model_problems(models: Sequence[TrtllmModel], options: LaunchOptions) -> list[str]:
    """What config.pbtxt says of ranks and GPUs, against the engine's world size."""
    problems: list[str] = []
    # On several machines gpu_device_ids is what each of them has.
    several_nodes = not options.multi_model and (options.hostfile is not None or options.launcher == "srun")
    for one in models:
        size = f"the engine has {ranks_text(one.world_size)} (tp {one.engine.tp} x pp {one.engine.pp})"
        for name, groups in (("gpu_device_ids", one.gpu_device_ids), ("participant_ids", one.participant_ids)):
            repeats = several_nodes and name == "gpu_device_ids"
            for group in groups:
                fits = one.world_size % len(group) == 0 if repeats else one.world_size == len(group)
                problems += [] if fits else [f"{one.name}: {name} {_text(group)} has {len(group)} entries; {size}"]
                problems += [f"{one.name}: {name} {_text(group)} has one twice"] if len(set(group)) < len(group) else []
            if groups and len(groups) != one.num_instances:
                problems.append(f"{one.name}: {len(groups)} groups in {name}, but {one.num_instances} instances")
        if one.num_instances > 1 and one.world_size > 1 and not options.multi_model:
            problems.append(
                f"{one.name}: {one.num_instances} instances of {ranks_text(one.world_size)} need --multi-model"
            )
    return problems + ([] if options.spawn or problems else _participant_problems(models))


def _participant_problems(models: Sequence[TrtllmModel]) -> list[str]:
    missing = [one for one in models if not one.participant_ids]
    if missing:
        return [
            f"{one.name}: no participant_ids, which --disable-spawn-processes needs; rank 0 is the orchestrator's: "
            f"trtbuild package ... --trtllm 'participant_ids={ids}'"
            for one, ids in _free_participants(models)
        ]
    taken = sorted(rank for one in models for group in one.participant_ids for rank in group)
    if taken != list(range(1, len(taken) + 1)):
        each = "; ".join(f"{one.name} {' and '.join(map(_text, one.participant_ids))}" for one in models)
        return [
            f"participant_ids must be 1 to {len(taken)}, each rank once, since 0 is the orchestrator; they are {each}"
        ]
    return []


def _free_participants(models: Sequence[TrtllmModel]) -> list[tuple[TrtllmModel, str]]:
    """For the models without participant_ids: the next ranks behind those of the others, as the backend reads them."""
    first = 1 + max((rank for one in models for group in one.participant_ids for rank in group), default=0)
    found: list[tuple[TrtllmModel, str]] = []
    for one in models:
        groups: list[str] = []
        for _ in range(0 if one.participant_ids else one.num_instances):
            groups.append(_text(range(first, first + one.world_size)))
            first += one.world_size
        found += [(one, ";".join(groups))] if groups else []
    return found


def _place_problems(
    models: Sequence[TrtllmModel], options: LaunchOptions, hosts: tuple[Host, ...], world_size: int
) -> list[str]:
    """Whether the ranks fit on the machines."""
    per_node = min((one.gpus_per_node for one in models), default=8)
    if hosts:
        if world_size == 1:
            return ["--hostfile, but the engine has one rank"]
        return host_problems(hosts, world_size, per_node, first_rank=int(options.multi_model))
    if options.launcher == "mpirun" and not options.multi_model and world_size > per_node:
        return [
            f"{world_size} ranks, and the engine is for {per_node} GPUs a node (gpus_per_node): "
            "name the machines by --hostfile, or use --launcher srun"
        ]
    return []


def _world_size(models: Sequence[TrtllmModel], options: LaunchOptions) -> int:
    """Processes that are started."""
    if not options.multi_model:
        return max(one.world_size for one in models)
    return 1 if options.spawn else 1 + sum(len(group) for one in models for group in one.participant_ids)


def _environment(options: LaunchOptions) -> dict[str, str]:
    if not options.multi_model:
        return {}
    return {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": str(int(options.spawn))}


def _launcher(models: Sequence[TrtllmModel], options: LaunchOptions, world_size: int) -> list[str]:
    if world_size == 1 and not options.multi_model:
        return []
    if options.launcher == "srun":
        per_node = min(world_size, min(one.gpus_per_node for one in models) + int(options.multi_model))
        return [
            "srun", f"--ntasks={world_size}", f"--nodes={-(-world_size // per_node)}", f"--ntasks-per-node={per_node}",
            *_unless_given(("--distribution=block", "--mpi=pmix", "--kill-on-bad-exit=1"), options.arguments),
            *options.arguments,
        ]  # fmt: skip
    # Up to two processes Open MPI binds each to one core, which a server's threads would share.
    hosts = [] if options.hostfile is None else ["--hostfile", str(options.hostfile), "--map-by", "slot"]
    return ["mpirun", "--allow-run-as-root", "--bind-to", "none", *hosts, *options.arguments]


def _unless_given(defaults: Sequence[str], given: Sequence[str]) -> list[str]:
    names = {one.partition("=")[0] for one in given}
    return [one for one in defaults if one.partition("=")[0] not in names]


def _rank(rank: int, models: Sequence[TrtllmModel], server: ServerOptions, extra: Sequence[str]) -> list[str]:
    """tritonserver's command line: rank 0 has the models and the user's ports, others the engines alone."""
    ports = server.ports if rank == 0 else _worker_ports(server.ports, rank)
    names = (server.names if rank == 0 else [one.name for one in models]) or ()
    control = ["--model-control-mode=explicit", *(f"--load-model={name}" for name in names)] if names else []
    return [
        str(server.binary), f"--model-repository={server.repository}",
        *(f"--{name}={value}" for name, value in _pairs(ports.arguments())),
        *control, "--disable-auto-complete-config", f"--backend-config=python,shm-region-prefix-name=prefix{rank}_",
        f"--exit-timeout-secs={server.exit_timeout_s}", *extra, *server.arguments,
    ]  # fmt: skip


def _worker_ports(ports: Ports, rank: int) -> Ports:
    """Beyond the user's, three for each rank, for this machine only: nobody talks to them."""
    first = max(ports.http, ports.grpc, ports.metrics) + 1 + 3 * (rank - 1)
    if first + 2 > 65535:
        raise Refused(
            f"serve: no ports above {first - 1} for rank {rank}; give lower --http-port, --grpc-port, --metrics-port"
        )
    return Ports(first, first + 1, first + 2)


def _orchestrator_arguments(models: Sequence[TrtllmModel], num_gpus: int | None) -> list[str]:
    """An orchestrator computes nothing: Triton's own pools would take memory, and a CUDA context, on every GPU."""
    used = [max((*group, -1)) + 1 for one in models for group in one.gpu_device_ids]
    count = num_gpus if num_gpus is not None else max([*used, *(one.world_size for one in models)])
    pools = [f"--cuda-memory-pool-byte-size={index}:0" for index in range(count)]
    return ["--pinned-memory-pool-byte-size=0", "--enable-peer-access=false", *pools]


def _exported(environment: Mapping[str, str]) -> list[str]:
    return sorted(name for name in environment if _EXPORTED.fullmatch(name))


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    return [(name.removeprefix("--"), value) for name, value in zip(arguments[::2], arguments[1::2], strict=True)]


def _joined(groups: Sequence[Sequence[str]], separator: str) -> list[str]:
    parts = [part for group in groups for part in (*group, separator)]
    return parts[:-1]


def _text(group: Sequence[int]) -> str:
    return ",".join(str(one) for one in group)
