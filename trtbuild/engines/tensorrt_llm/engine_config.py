"""config.json of a TensorRT-LLM engine directory, as releases 0.8 to 1.2 write it (tensorrt_llm/builder.py)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckpointError
from trtbuild.workspace import read_json

ENGINE_CONFIG = "config.json"


def engine_file(rank: int) -> str:
    return f"rank{rank}.engine"


@dataclass(frozen=True)
class TrtllmEngine:
    """What an engine directory says of itself; `data` is the whole config.json."""

    directory: Path
    data: dict[str, Any]

    @classmethod
    def open(cls, directory: Path) -> TrtllmEngine:
        """Raises CheckpointError where config.json is missing, damaged, or not TensorRT-LLM's of 0.8 or later."""
        file = directory / ENGINE_CONFIG
        if not file.is_file():
            raise CheckpointError(f"{directory}: no {ENGINE_CONFIG}; this is not a TensorRT-LLM engine directory")
        data = read_json(file)
        for section in ("pretrained_config", "build_config"):
            if not isinstance(data.get(section), dict):
                raise CheckpointError(
                    f"{file}: no {section!r}; an engine's config.json has version, pretrained_config and build_config "
                    "(a checkpoint's has not, nor has one of a release before 0.8: build it again)"
                )
        return cls(directory, data)

    @property
    def version(self) -> str | None:
        """Release of TensorRT-LLM that built it."""
        return self.data.get("version")

    @property
    def model(self) -> dict[str, Any]:
        """pretrained_config: the rank checkpoint's config.json."""
        return self.data["pretrained_config"]

    @property
    def build(self) -> dict[str, Any]:
        """build_config: limits and features."""
        return self.data["build_config"]

    @property
    def plugins(self) -> dict[str, Any]:
        """plugin_config inside build_config; values as in JSON: a type's name, a boolean or None."""
        return self.build.get("plugin_config") or {}

    @property
    def architecture(self) -> str:
        return self.model["architecture"]

    @property
    def vocab_size(self) -> int:
        return self.model["vocab_size"]

    @property
    def num_layers(self) -> int:
        return self.model["num_hidden_layers"]

    @property
    def tp(self) -> int:
        return int((self.model.get("mapping") or {}).get("tp_size", 1))

    @property
    def pp(self) -> int:
        return int((self.model.get("mapping") or {}).get("pp_size", 1))

    @property
    def world_size(self) -> int:
        """Ranks, each a process and a GPU of its own."""
        return int((self.model.get("mapping") or {}).get("world_size", 1))

    @property
    def quant_algo(self) -> str | None:
        return (self.model.get("quantization") or {}).get("quant_algo")

    @property
    def kv_cache_quant_algo(self) -> str | None:
        return (self.model.get("quantization") or {}).get("kv_cache_quant_algo")

    @property
    def logits_dtype(self) -> str:
        """float32 or float16."""
        return self.model.get("logits_dtype") or "float32"

    @property
    def max_batch_size(self) -> int:
        return self.build["max_batch_size"]

    @property
    def max_input_len(self) -> int:
        """Tokens of a prompt."""
        return self.build["max_input_len"]

    @property
    def max_seq_len(self) -> int:
        """Tokens of a prompt and its answer; before 0.11 the sum of max_input_len and max_output_len."""
        if self.build.get("max_seq_len") is not None:
            return self.build["max_seq_len"]
        return self.max_input_len + int(self.build.get("max_output_len") or 0)

    @property
    def max_num_tokens(self) -> int | None:
        """Tokens of one step over all requests."""
        return self.build.get("max_num_tokens")

    @property
    def max_beam_width(self) -> int:
        return int(self.build.get("max_beam_width") or 1)

    @property
    def max_prompt_embedding_table_size(self) -> int:
        """Rows of a prompt table (images, p-tuning); 0: none."""
        return int(self.build.get("max_prompt_embedding_table_size") or 0)

    @property
    def has_paged_kv_cache(self) -> bool:
        """By kv_cache_type, or in older releases by the plugin's switch."""
        kind = self.build.get("kv_cache_type")
        if kind is not None:
            return str(kind).rpartition(".")[2].lower() == "paged"
        return bool(self.plugins.get("paged_kv_cache", True))

    @property
    def has_paged_context_attention(self) -> bool:
        """use_paged_context_fmha, which KV reuse and chunked context need."""
        return bool(self.plugins.get("use_paged_context_fmha"))

    @property
    def tokens_per_block(self) -> int | None:
        return self.plugins.get("tokens_per_block")

    @property
    def has_lora(self) -> bool:
        return bool(self.plugins.get("lora_plugin"))

    @property
    def speculative_decoding_mode(self) -> int:
        """SpeculativeDecodingMode of the build: 1 none, then draft tokens, Medusa, lookahead and others."""
        return int(self.build.get("speculative_decoding_mode") or 1)
