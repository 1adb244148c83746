"""TensorRT-LLM engine directories without TensorRT-LLM: config.json with the fields of 1.2, and files for the ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.tensorrt_llm_config import tensorrt_llm_config
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.passport import FORMAT_VERSION, PASSPORT, file_digests
from trtbuild.workspace import REQUEST_FILE, digest_of

TINY_MIXTRAL = Path(__file__).parent / "checkpoints" / "tiny-mixtral"
VERSION = "1.2.1"
_TOKENIZER_FILES = (
    "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
_PLUGINS: dict[str, Any] = {
    "dtype": "bfloat16", "bert_attention_plugin": "auto", "gpt_attention_plugin": "auto", "gemm_plugin": None,
    "explicitly_disable_gemm_plugin": False, "gemm_swiglu_plugin": None, "fp8_rowwise_gemm_plugin": None,
    "qserve_gemm_plugin": None, "identity_plugin": None, "nccl_plugin": "bfloat16", "lora_plugin": None,
    "dora_plugin": False, "weight_only_groupwise_quant_matmul_plugin": None, "weight_only_quant_matmul_plugin": None,
    "smooth_quant_plugins": True, "smooth_quant_gemm_plugin": None, "layernorm_quantization_plugin": None,
    "rmsnorm_quantization_plugin": None, "quantize_per_token_plugin": False, "quantize_tensor_plugin": False,
    "moe_plugin": "auto", "mamba_conv1d_plugin": "auto", "low_latency_gemm_plugin": None,
    "low_latency_gemm_swiglu_plugin": None, "gemm_allreduce_plugin": None, "context_fmha": True,
    "bert_context_fmha_fp32_acc": False, "paged_kv_cache": True, "remove_input_padding": True,
    "norm_quant_fusion": False, "reduce_fusion": False, "user_buffer": False, "tokens_per_block": 32,
    "use_paged_context_fmha": True, "use_fp8_context_fmha": True, "fuse_fp4_quant": False, "multiple_profiles": False,
    "paged_state": True, "streamingllm": False, "manage_weights": False, "use_fused_mlp": True,
    "pp_reduce_scatter": False,
}  # fmt: skip
_BUILD: dict[str, Any] = {
    "max_input_len": 255, "max_seq_len": 256, "opt_batch_size": 8, "max_batch_size": 4, "max_beam_width": 1,
    "max_num_tokens": 512, "opt_num_tokens": 4, "max_prompt_embedding_table_size": 0, "kv_cache_type": "PAGED",
    "gather_context_logits": False, "gather_generation_logits": False, "strongly_typed": True,
    "force_num_profiles": None, "profiling_verbosity": "layer_names_only", "enable_debug_output": False,
    "max_draft_len": 0, "speculative_decoding_mode": 1, "use_refit": False, "input_timing_cache": None,
    "output_timing_cache": "model.cache",
    "lora_config": {
        "lora_dir": [], "lora_ckpt_source": "hf", "max_lora_rank": 64, "lora_target_modules": [],
        "trtllm_modules_to_hf_modules": {},
    },
    "weight_sparsity": False, "weight_streaming": False, "use_strip_plan": False, "max_encoder_input_len": 1024,
    "dry_run": False, "visualize_network": None, "monitor_memory": False, "use_mrope": False,
}  # fmt: skip


def make_trtllm_engine(
    directory: Path,
    *,
    name: str | None = None,
    version: str = VERSION,
    source: Path = TINY_MIXTRAL,
    model: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    precision: str = "bf16",
    pretrained: Mapping[str, Any] | None = None,
    quantization: Mapping[str, Any] | None = None,
    build: Mapping[str, Any] | None = None,
    plugins: Mapping[str, Any] | None = None,
) -> Path:
    """The engine `directory`, as the builder `tensorrt-llm` leaves it: its passport, request.json,
    config.json, engines, tokenizer.

    `source` gives the model and its tokenizer, `name` is the directory's unless given. The mappings replace fields:
    `model` of the passport's ModelConfig, `pretrained` and `quantization` of pretrained_config, `build` of
    build_config, `plugins` of its plugin_config. The engines are files with a few bytes each.
    """
    config = read_config(json.loads((source / "config.json").read_text(encoding="utf-8")))
    config = ModelConfig.from_dict(config.to_dict() | dict(model or {}))
    layout = layout or Layout()
    form = Precision.resolve(precision, config.dtype)  # type: ignore[arg-type]
    written = tensorrt_llm_config(config, layout, form) | dict(pretrained or {})
    written["quantization"] = written["quantization"] | dict(quantization or {})
    built = _BUILD | dict(build or {}) | {"plugin_config": _PLUGINS | dict(plugins or {})}
    directory.mkdir(parents=True, exist_ok=True)
    _write(directory / "config.json", {"version": version, "pretrained_config": written, "build_config": built})
    for rank in range(layout.world_size):
        (directory / f"rank{rank}.engine").write_bytes(b"ftrt" + bytes([rank]) * 60)
    _copy_tokenizer(source, directory)
    request = {"release": version, "model": str(source)}
    _write(directory / REQUEST_FILE, {"digest": digest_of(request), "request": request})
    _write(directory / PASSPORT, _passport(directory, name or directory.name, config, layout, form, built, version))
    return directory


def _passport(
    directory: Path,
    name: str,
    config: ModelConfig,
    layout: Layout,
    precision: Precision,
    built: Mapping[str, Any],
    version: str,
) -> dict[str, Any]:
    limits = EngineLimits(
        max_batch_size=built["max_batch_size"], max_seq_len=built["max_seq_len"], max_input_len=built["max_input_len"],
        chunk_size=min(512, built["max_seq_len"]),
    )  # fmt: skip
    commands = [["trtllm-build", "--checkpoint_dir", "build/NAME", "--output_dir", "engines/NAME"]]
    return {
        "format": FORMAT_VERSION,
        "name": name,
        "trtbuild": "0.1.0",
        "created": "2026-11-22T00:00:00Z",
        "rebuild": f"trtbuild compile tiny-mixtral --builder tensorrt-llm --name {name}",
        "recipe": {},
        "source": {"model": "tiny-mixtral", "revision": None, "digest": "0" * 32, "license": None},
        "model": config.to_dict(),
        "layout": asdict(layout),
        "precision": precision.to_dict(),
        "limits": asdict(limits),
        "targets": ["sm90"],
        "kv_cache": [],
        "builder": {
            "name": "tensorrt-llm", "version": version, "tensorrt": "10.14.1.48", "driver": "580.95.05",
            "gpu": "NVIDIA H100 80GB HBM3", "commands": commands * layout.world_size,
        },
        "segments": [],
        "plans": [],
        "tensors": None,
        "mixture": None,
        "notes": [],
        "accuracy": None,
        "digests": file_digests(directory, layout, [], weights=False),
    }  # fmt: skip


def _copy_tokenizer(source: Path, directory: Path) -> None:
    for folder, names in {"tokenizer": _TOKENIZER_FILES, "model_card": ("README.md", "LICENSE")}.items():
        (directory / folder).mkdir(exist_ok=True)
        for file in names:
            if (source / file).is_file():
                shutil.copyfile(source / file, directory / folder / file)


def _write(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
