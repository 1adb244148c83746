"""From an engine directory to something that answers: passport, weights, tokenizer, executor."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.device.choice import choose_executor, examine_machine
from trtbuild.engines.device.engine_ranks import load_tensorrt
from trtbuild.engines.executor import Executor
from trtbuild.engines.passport import Passport
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.engines.tensorrt.bindings import TORCH_TYPES
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.errors import Refused
from trtbuild.workspace import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("trtbuild.load")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Part of the free memory that KV caches may take; the rest is for activations and for others.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that is ready to run; `passport` is engine.json."""

    name: str
    executor: Executor
    tokenizer: PreTrainedTokenizerBase | None
    eos_token_ids: tuple[int, ...]
    passport: dict[str, Any]
    executor_why: str = ""
    """Why this executor was chosen."""


def load_engine(
    engine_dir: Path,
    num_slots: int | None = None,
    dtype: str | None = None,
    executor: str = "auto",
    device: str | None = None,
) -> LoadedEngine:
    """Check the passport, then load the engine for the executor that suits this machine, which is said aloud.

    executor: "tensorrt" (on GPUs that the plans were compiled for), "reference" (PyTorch, on a CPU, or CUDA where torch
    has it), or "auto": the first that can. `num_slots` defaults to the engine's batch size, or fewer where memory is
    short. `dtype` and `device` override the compute type and place (a GPU, where there is one) of the reference
    executor. Raises Refused or CheckpointError before any weight is read.
    """
    passport = Passport.open(engine_dir)
    passport.check_runnable()
    if dtype is not None and dtype not in DTYPES:
        raise Refused(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    choice = choose_executor(passport, executor, dtype, examine_machine(passport))
    log.info("%s executor: %s", choice.name, choice.why)
    passport.check_files()
    loaded: Executor
    if choice.name == "tensorrt":
        loaded = load_tensorrt(engine_dir, num_slots)
    else:
        loaded = _load_reference(passport, num_slots, dtype, device)
    has_tokenizer = any(passport.tokenizer_directory.glob("tokenizer*"))
    tokenizer = load_tokenizer(passport.tokenizer_directory) if has_tokenizer else None
    return LoadedEngine(passport.name, loaded, tokenizer, eos_token_ids(passport, tokenizer), passport.data, choice.why)


def _load_reference(
    passport: Passport, num_slots: int | None, dtype: str | None, device: str | None
) -> ReferenceExecutor:
    checkpoint = RankCheckpoint.open(passport.directory)
    return ReferenceExecutor(
        checkpoint.plans, checkpoint.tensor, passport.limits,
        num_slots=_fitting_slots(passport, num_slots), dtype=DTYPES[dtype] if dtype else None,
        device=torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )  # fmt: skip


def eos_token_ids(passport: Passport, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """What ends an answer: generation_config.json's eos_token_id (one or a list), else the tokenizer's."""
    file = passport.tokenizer_directory / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(int(i) for i in ids) if isinstance(ids, list) else (int(ids),)


def cache_bytes_per_token(passport: Passport) -> int:
    """KV cache bytes of one token over all ranks, as the plans declare their caches."""
    capacity = passport.limits.cache_capacity
    total = 0
    for record in map(PlanRecord.from_dict, passport.data["plans"]):
        # A decoder segment has the same caches in its prefill and its decode plan.
        if record.phase != "prefill":
            caches = (b for b in record.bindings if b.role == "cache" and b.alias is None)
            sizes = (math.prod(map(int, b.shape[1:])) * getattr(torch, TORCH_TYPES[b.dtype]).itemsize for b in caches)
            total += sum(sizes) * len(record.serves)
    return total // capacity


def _fitting_slots(passport: Passport, wanted: int | None) -> int:
    """Slots whose caches fit; an explicit number that does not fit is refused with both sizes."""
    limits = passport.limits
    per_slot = cache_bytes_per_token(passport) * limits.max_seq_len
    room = int(psutil.virtual_memory().available * _CACHE_SHARE)
    slots = wanted or min(limits.max_batch_size, max(1, room // per_slot))
    if slots * per_slot > room and (wanted or slots > 1):
        raise Refused(
            f"{slots} slots of {limits.max_seq_len} tokens take {slots * per_slot / 2**30:.2f} GiB of KV cache; "
            f"{room / 2**30:.2f} GiB may be used; ask for {max(1, room // per_slot)} slots"
        )
    log.info("%d slots of %d tokens: %.1f MiB of KV cache", slots, limits.max_seq_len, slots * per_slot / 2**20)
    return slots
