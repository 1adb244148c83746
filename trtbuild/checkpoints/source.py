"""A Hugging Face checkpoint: a local directory, or a hub id resolved through huggingface_hub's cache."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.checkpoints.families import Family, family_of, read_config
from trtbuild.checkpoints.known_models import KNOWN_MODELS, bundled_directory
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.safetensors_file import MappedTensors, TensorEntry, read_header, sampled_digest
from trtbuild.errors import CheckpointError, Refused
from trtbuild.workspace import digest_of

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
# RoPE frequencies are computed; a tied model's file may hold its lm_head once more.
_IGNORED_TENSORS = ("rotary_emb.inv_freq", "lm_head.weight")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# What the engine needs besides the weights, where the checkpoint has it.
COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "LICENSE", "README.md",
)  # fmt: skip
# Not every *.safetensors: some repositories ship the same weights twice, in the authors' own layout.
_HUB_PATTERNS = ["config.json", INDEX_FILE, "model*.safetensors", *COMPANION_FILES]


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint whose headers have been checked; weights are read on use.

    `model` is what the user named; `revision` is the hub commit that it resolved to, None for a directory.
    """

    model: str
    directory: Path
    revision: str | None = None

    @classmethod
    def open(cls, model: str, revision: str | None = None, *, weights: bool = True) -> CheckpointSource:
        """`model` is a known name, a local directory or a hub id; without `weights` only its config is needed.

        Raises CheckpointError or Refused with what was found and the fix, before any weight is read.
        """
        directory, commit = _resolve(model, revision)
        source = cls(model, directory, commit)
        _ = source.config
        if weights:
            _ = source.entries
        return source

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        return _read_json(self.directory / "config.json")

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.hf_config)

    @cached_property
    def family(self) -> Family:
        return family_of(self.config.architecture)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor of every shard, checked against the index and against the shapes that the config implies."""
        entries = _read_shards(self.directory)
        self._check_shapes(entries)
        return entries

    @cached_property
    def _mapped(self) -> MappedTensors:
        return MappedTensors(self.entries)

    def tensor(self, canonical: str) -> torch.Tensor:
        """The weight behind a canonical name (see `families`), as a view of the file."""
        return self._mapped.tensor(self.family.source_name(canonical))

    @cached_property
    def digest(self) -> str:
        """Identifies config.json and the weights (see `sampled_digest`)."""
        config = (self.directory / "config.json").read_bytes()
        has_weights = any(self.directory.glob("*.safetensors"))
        return hashlib.sha256(config + (sampled_digest(self.entries) if has_weights else "").encode()).hexdigest()

    @property
    def companions_digest(self) -> str:
        """Identifies tokenizer, chat template and generation config, which an engine takes along."""
        files = (self.directory / name for name in COMPANION_FILES)
        contents = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
        return digest_of(contents)

    @property
    def license(self) -> str | None:
        """The licence that the model card's header names, if any."""
        card = self.directory / "README.md"
        head = card.read_text(encoding="utf-8", errors="replace")[:4000] if card.is_file() else ""
        found = re.search(r"^license:\s*(\S+)", head, re.MULTILINE)
        return found.group(1) if found else None

    def _check_shapes(self, entries: dict[str, TensorEntry]) -> None:
        problems = []
        expected = {self.family.source_name(name): shape for name, shape in expected_shapes(self.config).items()}
        for name in sorted(entries.keys() - expected.keys()):
            if not name.endswith(_IGNORED_TENSORS):
                problems.append(
                    f"tensor {name!r} has no place in {self.config.architecture}; dropping it could change the result"
                )
        for name, shape in expected.items():
            if name not in entries:
                problems.append(f"tensor {name!r} is missing")
            elif entries[name].spec.shape != shape:
                problems.append(
                    f"tensor {name!r} has shape {list(entries[name].spec.shape)}, config.json implies {list(shape)}"
                )
            elif entries[name].spec.dtype not in ("BF16", "F16", "F32"):
                problems.append(f"tensor {name!r} is {entries[name].spec.dtype}; BF16, F16 and F32 are read")
        if self.config.tie_embeddings and not problems and not _head_is_embedding(entries):
            problems.append(
                "lm_head.weight differs from the embedding, though tie_word_embeddings is true; "
                "set it to false in config.json if the head is its own"
            )
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:20])
            more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(f"{self.directory.name}: weights do not match config.json:{shown}{more}")


def _head_is_embedding(entries: dict[str, TensorEntry]) -> bool:
    """Whether a tied model's file has no lm_head of its own, or the embedding once more."""
    import torch

    if "lm_head.weight" not in entries:
        return True
    mapped = MappedTensors(entries)
    return torch.equal(mapped.tensor("lm_head.weight"), mapped.tensor("model.embed_tokens.weight"))


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every weight that a checkpoint of this config has."""
    hidden, q = config.hidden_size, config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab_size, hidden), "final_norm": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head"] = (config.vocab_size, hidden)
    for layer in range(config.num_layers):
        name = f"layers.{layer}."
        shapes |= {name + "input_layernorm": (hidden,), name + "post_layernorm": (hidden,)}
        shapes |= {name + "q": (q, hidden), name + "k": (kv, hidden), name + "v": (kv, hidden), name + "o": (hidden, q)}
        if config.qkv_bias:
            shapes |= {name + "q.bias": (q,), name + "k.bias": (kv,), name + "v.bias": (kv,)}
        if config.dense_bias:
            shapes[name + "o.bias"] = (hidden,)
        if config.moe:
            shapes[name + "router"] = (config.moe.num_experts, hidden)
            for expert in range(config.moe.num_experts):
                shapes |= _mlp_shapes(f"{name}experts.{expert}.", config.moe.intermediate_size, hidden, bias=False)
        else:
            shapes |= _mlp_shapes(name, config.intermediate_size, hidden, bias=config.mlp_bias)
    return shapes


def _mlp_shapes(name: str, size: int, hidden: int, *, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        name + "gate": (size, hidden),
        name + "up": (size, hidden),
        name + "down": (hidden, size),
    }
    if bias:
        shapes |= {name + "gate.bias": (size,), name + "up.bias": (size,), name + "down.bias": (hidden,)}
    return shapes


def _resolve(model: str, revision: str | None) -> tuple[Path, str | None]:
    local = Path(model).expanduser()
    if local.is_dir():
        if (local / "trtbuild.json").is_file() or (local / "engine.json").is_file():
            raise Refused(f"model {model!r} is a result of trtbuild, not a Hugging Face checkpoint")
        if revision is not None:
            raise Refused(f"--revision {revision} is for hub models; {model!r} is a directory")
        return local.resolve(), None
    if local.is_file():
        raise Refused(f"model {model!r} is a file; name its directory, or a recipe (*.toml)")
    if model in KNOWN_MODELS:
        known = KNOWN_MODELS[model]
        bundled = bundled_directory(model)
        if bundled:
            return bundled, None
        if known.hub_id is None:
            raise CheckpointError(
                f"{model} is bundled with the source checkout (tests/checkpoints/{model}), which is not here"
            )
        return _download(known.hub_id, revision)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        names = ", ".join(sorted(KNOWN_MODELS))
        raise Refused(f"model {model!r}: no such directory, not a hub id (OWNER/NAME), and not a known name ({names})")
    return _download(model, revision)


def _download(hub_id: str, revision: str | None) -> tuple[Path, str | None]:
    """Fetch (or find in the cache) a snapshot; its directory is named after the commit that `revision` meant."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise Refused(f"model {hub_id!r} is neither a directory nor a valid hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot fetch {hub_id} from the hub ({first_line}); check the name, your token (HF_TOKEN) and the "
            "network, or pass a local directory"
        ) from error
    return directory, directory.name


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.parent.name}: no {file.name}; is this a Hugging Face checkpoint?") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.parent.name}/{file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file.parent.name}/{file.name} is not a JSON object")
    return content


def _read_shards(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of the shards that the index names, or of the one file where there is no index."""
    index = directory / INDEX_FILE
    listed: dict[str, str] | None = None
    if index.exists():
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
            raise CheckpointError(f"{INDEX_FILE}: no weight_map of tensor names to file names")
        files = sorted(set(listed.values()))
    else:
        files = sorted(file.name for file in directory.glob("model*.safetensors"))
        files = files or sorted(file.name for file in directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)
        if pickles:
            raise Refused(
                f"{directory.name} has only pickle weights ({pickles[0]}), which can run code; "
                "convert it to safetensors"
            )
        raise CheckpointError(f"{directory.name}: no *.safetensors files")
    entries: dict[str, TensorEntry] = {}
    for name in files:
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{directory.name}: the index names {name!r}, which is not a file of this checkpoint")
        for tensor, entry in read_header(directory / name).items():
            if tensor in entries:
                raise CheckpointError(f"tensor {tensor!r} is both in {entries[tensor].file.name} and in {name}")
            entries[tensor] = entry
    for tensor, name in (listed or {}).items():
        if tensor not in entries or entries[tensor].file.name != name:
            raise CheckpointError(f"{INDEX_FILE} says that {tensor!r} is in {name}, where it is not")
    return entries
