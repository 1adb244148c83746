"""Names that `MODEL` may be, besides a directory and a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KnownModel:
    """`hub_id` is None for a model that only the source checkout carries."""

    architecture: str
    hub_id: str | None
    note: str = ""


KNOWN_MODELS: dict[str, KnownModel] = {
    "tiny-mixtral": KnownModel("MixtralForCausalLM", None, "bundled, 5.8 M parameters, for trying things out"),
    "tiny-qwen2": KnownModel("Qwen2ForCausalLM", None, "bundled, 2.0 M parameters, for trying things out"),
    "mixtral": KnownModel("MixtralForCausalLM", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "mixtral-8x22b": KnownModel("MixtralForCausalLM", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
    "mistral-7b": KnownModel("MistralForCausalLM", "mistralai/Mistral-7B-Instruct-v0.3"),
    "mistral-small": KnownModel("MistralForCausalLM", "mistralai/Mistral-Small-24B-Instruct-2501"),
    "mistral-large-2": KnownModel("MistralForCausalLM", "mistralai/Mistral-Large-Instruct-2407"),
    "codestral": KnownModel("MistralForCausalLM", "mistralai/Codestral-22B-v0.1"),
    "qwen2.5-0.5b": KnownModel("Qwen2ForCausalLM", "Qwen/Qwen2.5-0.5B-Instruct"),
    "qwen2.5-7b": KnownModel("Qwen2ForCausalLM", "Qwen/Qwen2.5-7B-Instruct"),
    "qwen2.5-coder-7b": KnownModel("Qwen2ForCausalLM", "Qwen/Qwen2.5-Coder-7B-Instruct"),
    "qwen2-72b": KnownModel("Qwen2ForCausalLM", "Qwen/Qwen2-72B-Instruct"),
    "llama-3.1-8b": KnownModel("LlamaForCausalLM", "meta-llama/Llama-3.1-8B-Instruct"),
    "llama-3.3-70b": KnownModel("LlamaForCausalLM", "meta-llama/Llama-3.3-70B-Instruct"),
    "llama-2-70b": KnownModel("LlamaForCausalLM", "meta-llama/Llama-2-70b-chat-hf"),
    "yi-34b": KnownModel("LlamaForCausalLM", "01-ai/Yi-1.5-34B-Chat"),
}


def bundled_directory(name: str) -> Path | None:
    """tests/checkpoints/NAME of the checkout that the package is imported from, if it is one."""
    directory = Path(__file__).resolve().parents[2] / "tests" / "checkpoints" / name
    return directory if (directory / "config.json").is_file() else None
