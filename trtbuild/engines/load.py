"""From an engine directory to something that answers: passport, weights, tokenizer, executor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.executor import Executor
from trtbuild.engines.passport import Passport
from trtbuild.engines.reference.executor import ReferenceExecutor
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


def load_engine(engine_dir: Path, num_slots: int | None = None, dtype: str | None = None) -> LoadedEngine:
    """Check the passport, then load on this machine: on a CPU, or CUDA where torch has it, the reference executor.

    `num_slots` defaults to the engine's batch size, or fewer where memory is short. `dtype` overrides the compute
    type of the reference executor. Raises Refused or CheckpointError before any weight is read.
    """
    passport = Passport.open(engine_dir)
    passport.check_runnable()
    passport.check_files()
    checkpoint = RankCheckpoint.open(engine_dir)
    if dtype is not None and dtype not in DTYPES:
        raise Refused(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    slots = _fitting_slots(passport, num_slots)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    executor = ReferenceExecutor(
        checkpoint.plans, checkpoint.tensor, passport.limits,
        num_slots=slots, dtype=DTYPES[dtype] if dtype else None, device=device,
    )  # fmt: skip
    has_tokenizer = any(passport.tokenizer_directory.glob("tokenizer*"))
    tokenizer = load_tokenizer(passport.tokenizer_directory) if has_tokenizer else None
    return LoadedEngine(passport.name, executor, tokenizer, eos_token_ids(passport, tokenizer), passport.data)


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
    """KV cache bytes of one token over all ranks, in the 16-bit type; duplicated heads count once per rank."""
    config, layout = passport.config, passport.layout
    heads = sum(len(layout.rank(rank).kv_heads(config.num_kv_heads)) for rank in range(layout.tp))
    return 2 * config.num_layers * heads * config.head_dim * 2


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
