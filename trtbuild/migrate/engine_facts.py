"""What an engine directory says of itself, taken with care: the file may be of any release, and edited by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.engines.tensorrt_llm.engine_config import ENGINE_CONFIG, TrtllmEngine
from trtbuild.errors import CheckpointError
from trtbuild.migrate.release import Release
from trtbuild.workspace import read_json

_RANK_FILE = re.compile(r"rank(\d+)\.engine")
_OLD_RANK_FILE = re.compile(r".+_tp(\d+)_(?:pp\d+_)?rank(\d+)\.engine|.+_tp(\d+)_rank(\d+)\.engine")
_HF_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# SpeculativeDecodingMode: 1 none, then one bit each.
SPECULATIVE_NAMES = {2: "draft_tokens_external", 4: "medusa", 8: "lookahead", 16: "redrafter", 32: "eagle"}


@dataclass(frozen=True)
class EngineFacts:
    """Sections of an engine's config.json, as dictionaries that are there. Numbers are None where they are none."""

    directory: Path
    version_text: str | None
    model: Mapping[str, Any]
    build: Mapping[str, Any]
    plugins: Mapping[str, Any]
    is_old: bool = False
    """Before 0.8: builder_config in place of pretrained_config and build_config."""

    @classmethod
    def open(cls, directory: Path) -> EngineFacts:
        """Raises CheckpointError, saying what the directory is instead."""
        try:
            engine = TrtllmEngine.open(directory)
        except CheckpointError as error:
            return cls._open_old(directory, error)
        except OSError as error:
            raise CheckpointError(f"{directory / ENGINE_CONFIG}: {error.strerror}") from error
        version = engine.data.get("version")
        return cls(
            directory, version if isinstance(version, str) else None,
            _section(engine.model), _section(engine.build), _section(engine.build.get("plugin_config")),
        )  # fmt: skip

    @classmethod
    def _open_old(cls, directory: Path, error: CheckpointError) -> EngineFacts:
        file = directory / ENGINE_CONFIG
        if not file.is_file():
            raise CheckpointError(f"no {ENGINE_CONFIG}") from error
        data = read_json(file)
        builder = data.get("builder_config")
        if not isinstance(builder, dict):
            raise CheckpointError(_what_it_is(directory, data)) from error
        layout = {"tp_size": builder.get("tensor_parallel"), "pp_size": builder.get("pipeline_parallel")}
        sizes = [value if isinstance(value, int) else 1 for value in layout.values()]
        model = {
            "architecture": builder.get("name"), "dtype": builder.get("precision"),
            "num_hidden_layers": builder.get("num_layers"), "num_attention_heads": builder.get("num_heads"),
            "num_key_value_heads": builder.get("num_kv_heads"), "hidden_size": builder.get("hidden_size"),
            "vocab_size": builder.get("vocab_size"), "max_position_embeddings": builder.get("max_position_embeddings"),
            "mapping": {**layout, "world_size": sizes[0] * sizes[1]},
        }  # fmt: skip
        return cls(directory, None, model, builder, _section(data.get("plugin_config")), is_old=True)

    @property
    def release(self) -> Release | None:
        return Release.parse(self.version_text)

    @property
    def mapping(self) -> Mapping[str, Any]:
        return _section(self.model.get("mapping"))

    @property
    def quantization(self) -> Mapping[str, Any]:
        return _section(self.model.get("quantization"))

    def limit(self, name: str) -> int | None:
        """A whole number of build_config above zero."""
        return number(self.build.get(name))

    @property
    def max_seq_len(self) -> int | None:
        """Before 0.11 what prompt and answer may be together."""
        parts = (self.limit("max_input_len"), self.limit("max_output_len"))
        return self.limit("max_seq_len") or (parts[0] + parts[1] if parts[0] and parts[1] else None)

    @property
    def max_beam_width(self) -> int:
        return self.limit("max_beam_width") or 1

    @property
    def tp(self) -> int:
        return number(self.mapping.get("tp_size")) or 1

    @property
    def pp(self) -> int:
        return number(self.mapping.get("pp_size")) or 1

    @property
    def cp(self) -> int:
        return number(self.mapping.get("cp_size")) or 1

    @property
    def world_size(self) -> int:
        return number(self.mapping.get("world_size")) or self.tp * self.pp * self.cp

    @property
    def logits_type(self) -> str:
        """As Triton writes it."""
        return "FP16" if self.model.get("logits_dtype") == "float16" else "FP32"

    @property
    def has_paged_kv_cache(self) -> bool:
        kind = self.build.get("kv_cache_type")
        if isinstance(kind, str):
            return kind.rpartition(".")[2].lower() == "paged"
        return self.plugins.get("paged_kv_cache") is not False

    @property
    def has_packed_input(self) -> bool:
        return self.plugins.get("remove_input_padding") is not False

    @property
    def has_paged_context_attention(self) -> bool:
        return bool(self.plugins.get("use_paged_context_fmha"))

    @property
    def has_lora(self) -> bool:
        return bool(self.plugins.get("lora_plugin"))

    @property
    def speculative_mode(self) -> str | None:
        """None: it does not speculate."""
        mode = self.build.get("speculative_decoding_mode")
        if isinstance(mode, str):
            return next((name for name in SPECULATIVE_NAMES.values() if name.split("_")[0] in mode.lower()), None)
        return SPECULATIVE_NAMES.get(mode) if isinstance(mode, int) else None

    def rank_files(self) -> set[int]:
        """Ranks that have a plan here."""
        found = set()
        for path in self.directory.iterdir():
            match = _RANK_FILE.fullmatch(path.name)
            old = _OLD_RANK_FILE.fullmatch(path.name) if self.is_old else None
            if match:
                found.add(int(match.group(1)))
            elif old:
                found.add(int(old.group(2) or old.group(4)))
        return found


def number(value: object) -> int | None:
    """A whole number above zero, or None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53 else None


def _section(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _what_it_is(directory: Path, data: Mapping[str, Any]) -> str:
    if "quantization" in data and "mapping" in data:
        return "a TensorRT-LLM checkpoint, not an engine: trtllm-build makes the engine of it"
    if "architectures" in data or any((directory / name).is_file() for name in _HF_FILES):
        return "a Hugging Face checkpoint, not an engine"
    return f"its {ENGINE_CONFIG} is no engine's: it has neither build_config nor builder_config"
