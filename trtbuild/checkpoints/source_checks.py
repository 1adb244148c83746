"""Whether a checkpoint's tensors are those that its config.json implies: none missing, none left over."""

from __future__ import annotations

from collections.abc import Mapping

from trtbuild.checkpoints.hub_formats.modules import StoredModule, module_problems
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.safetensors_file import MappedTensors, TensorEntry
from trtbuild.checkpoints.source_files import IGNORED_TENSORS
from trtbuild.checkpoints.source_tensors import Shapes
from trtbuild.errors import CheckpointError


def check_weights(
    name: str, config: ModelConfig, entries: dict[str, TensorEntry], expected: Shapes, modules: dict[str, StoredModule]
) -> None:
    """`expected` are the files' names in 16 bit, `modules` what is quantized of them, by the same names.

    Raises CheckpointError, under the checkpoint's `name`, that lists what does not fit.
    """
    problems = _left_over(config, entries, expected, modules)
    for weight, shape in expected.items():
        if weight in modules:
            problems += module_problems(modules[weight], entries)
        elif weight not in entries:
            problems.append(f"tensor {weight!r} is missing")
        elif entries[weight].spec.shape != shape:
            found = list(entries[weight].spec.shape)
            problems.append(f"tensor {weight!r} has shape {found}, config.json implies {list(shape)}")
        elif entries[weight].spec.dtype not in ("BF16", "F16", "F32"):
            problems.append(f"tensor {weight!r} is {entries[weight].spec.dtype}; BF16, F16 and F32 are read")
    if config.tie_embeddings and not problems and not _head_is_embedding(entries):
        problems.append(
            "lm_head.weight differs from the embedding, though tie_word_embeddings is true; "
            "set it to false in config.json if the head is its own"
        )
    if problems:
        shown = "".join(f"\n  - {problem}" for problem in problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{name}: weights do not match config.json:{shown}{more}")


def _left_over(
    config: ModelConfig, entries: dict[str, TensorEntry], expected: Shapes, modules: Mapping[str, StoredModule]
) -> list[str]:
    places = {tensor for module in modules.values() for tensor in module.tensors} | (expected.keys() - modules.keys())
    mapped = MappedTensors(entries)
    return [
        f"tensor {name!r} has no place in {config.architecture}; dropping it could change the result"
        for name in sorted(entries.keys() - places)
        if not name.endswith(IGNORED_TENSORS) and not _is_void_bias(name, modules, mapped)
    ]


def _is_void_bias(name: str, modules: Mapping[str, StoredModule], mapped: MappedTensors) -> bool:
    """Whether this is a bias of nothing but zeros, which AutoGPTQ writes for every layer that it quantizes."""
    if not name.endswith(".bias") or name.removesuffix(".bias") + ".weight" not in modules:
        return False
    return not bool(mapped.tensor(name).any())


def _head_is_embedding(entries: dict[str, TensorEntry]) -> bool:
    """Whether a tied model's file has no lm_head of its own, or the embedding once more."""
    import torch

    if "lm_head.weight" not in entries:
        return True
    mapped = MappedTensors(entries)
    return torch.equal(mapped.tensor("lm_head.weight"), mapped.tensor("model.embed_tokens.weight"))
