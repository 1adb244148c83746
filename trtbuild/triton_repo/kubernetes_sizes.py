"""What a pod of an engine asks a cluster for: GPUs, memory and processors, from the engine's passport."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trtbuild.engines.passport import Passport
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.units import format_bytes

GIB = 2**30
# Triton, its three stubs and the front end; and an engine worker's process with torch and TensorRT, once for each rank
# that it holds on a GPU. Assumptions, not measured.
SERVER_BYTES = 2 * GIB
RANK_BYTES = 3 * GIB
# Triton's Python backend and NCCL share memory through /dev/shm.
_SHM_BYTES = 2 * GIB
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DEFAULT_THREADS = 4


@dataclass(frozen=True)
class PodSizes:
    """One pod of an engine, which is one node's part of it.

    weight_bytes, cache_bytes: of the fullest GPU, or of the whole model on CPUs; the KV cache for every slot at its
    full length, which is the most that the worker takes. ranks: of this pod. gpus: 0 for the reference executor.
    """

    num_nodes: int
    ranks: int
    gpus: int
    slots: int
    weight_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, passport: Passport, settings: WorkerSettings, gpus_per_node: int, no_gpu: bool) -> PodSizes:
        """Arithmetic of the passport alone: no weight is read."""
        ranks = passport.layout.world_size
        slots = settings.slots or passport.limits.max_batch_size
        if no_gpu:
            return cls(1, ranks, 0, slots, *_reference_bytes(passport, settings, slots))
        num_nodes = max(1, ranks // gpus_per_node)
        here = ranks // num_nodes
        return cls(num_nodes, here, here, slots, *_device_bytes(passport, slots))

    @property
    def shm(self) -> str:
        return _quantity(_SHM_BYTES)

    @property
    def host_bytes(self) -> int:
        """Memory of the container; what it keeps in /dev/shm counts."""
        if self.gpus:
            return SERVER_BYTES + _SHM_BYTES + RANK_BYTES * self.ranks
        return SERVER_BYTES + _SHM_BYTES + RANK_BYTES + self.weight_bytes + self.cache_bytes

    def resources(self, threads: int | None = None) -> dict[str, Any]:
        """Requests and limits. On GPUs the limit has room for the weights' files in the page cache."""
        memory = _quantity(self.host_bytes)
        if not self.gpus:
            cpu = str(threads or _DEFAULT_THREADS)
            return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": memory}}
        gpus, cpu = str(self.gpus), str(2 + self.gpus)
        limit = _quantity(self.host_bytes + self.weight_bytes * self.ranks)
        return {
            "requests": {"cpu": cpu, "memory": memory, "nvidia.com/gpu": gpus},
            "limits": {"memory": limit, "nvidia.com/gpu": gpus},
        }

    def annotations(self) -> dict[str, str]:
        place = "gpu" if self.gpus else "pod"
        return {
            f"trtbuild-weight-bytes-per-{place}": str(self.weight_bytes),
            f"trtbuild-kv-cache-bytes-per-{place}": str(self.cache_bytes),
        }

    def describe(self) -> str:
        place = f"each of {self.gpus * self.num_nodes} GPUs" if self.gpus else "memory"
        nodes = f" on {self.num_nodes} nodes" if self.num_nodes > 1 else ""
        return (
            f"{format_bytes(self.weight_bytes)} of weights and up to {format_bytes(self.cache_bytes)} of KV cache "
            f"({self.slots} slots) in {place}{nodes}"
        )


def _device_bytes(passport: Passport, slots: int) -> tuple[int, int]:
    """Weights and KV cache of the fullest rank."""
    from trtbuild.checkpoints.rank_plan import plan_rank
    from trtbuild.planning.model_size import measure_rank

    # Ranks of a stage are equal but for padding.
    layout = passport.layout
    stages = [layout.rank(layout.stage_ranks(stage)[0]) for stage in range(layout.pp)]
    sizes = [measure_rank(plan_rank(passport.config, rank, passport.precision)) for rank in stages]
    cache = max(size.cache_bytes for size in sizes) * passport.limits.cache_capacity * slots
    return max(size.weight_bytes for size in sizes), cache


def _reference_bytes(passport: Passport, settings: WorkerSettings, slots: int) -> tuple[int, int]:
    """Of all ranks together; PyTorch computes with quantized weights that were unpacked to its compute type."""
    from trtbuild.checkpoints.rank_plan import plan_rank
    from trtbuild.planning.model_size import CACHE_ITEM, count_parameters, measure_rank

    item = _ITEM_BYTES[settings.dtype] if settings.dtype else 2
    sizes = [measure_rank(plan_rank(passport.config, rank, passport.precision)) for rank in passport.layout.ranks()]
    cache = sum(size.cache_bytes for size in sizes) * passport.limits.cache_capacity * slots
    return count_parameters(passport.config).total * item, cache * item // CACHE_ITEM


def _quantity(size: int) -> str:
    """In Kubernetes' units, rounded up to a MiB."""
    return f"{-(-size // 2**20)}Mi"
