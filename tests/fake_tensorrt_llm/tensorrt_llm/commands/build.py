"""trtllm-build of 1.2 as far as its interface is documented: the same flags, the same files, no TensorRT.

Its rules were read in tensorrt_llm/{builder.py,commands/build.py,plugin/plugin.py} and are written down here on their
own, apart from trtbuild's. FAKE_TRTLLM says what goes wrong: words such as `crash:1` (rank 1), `kill:1`, `oom:0`,
`empty:0`, `sleep:1` (rank 1 takes a minute), `change:max_batch_size=4`, `drop-rank:1`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

VERSION = "1.2.1"
_NUMBERS = {
    "max_batch_size": 2048, "max_input_len": 1024, "max_beam_width": 1, "max_num_tokens": 8192, "opt_num_tokens": None,
    "max_encoder_input_len": 1024, "workers": 1, "max_lora_rank": 64, "max_draft_len": 0, "auto_parallel": 1,
    "gpus_per_node": 8, "tokens_per_block": 32,
}  # fmt: skip
_TEXTS = (
    "checkpoint_dir", "model_config", "build_config", "model_cls_file", "model_cls_name", "input_timing_cache",
    "visualize_network", "cluster_key",
)  # fmt: skip
_SWITCHES = (
    "strip_plan", "weight_sparsity", "weight_streaming", "fast_build", "enable_debug_output", "dry_run",
    "monitor_memory", "gather_context_logits", "gather_generation_logits", "gather_all_token_logits",
)  # fmt: skip
_ON = (
    "context_fmha", "remove_input_padding", "use_paged_context_fmha", "use_fp8_context_fmha", "paged_state",
    "use_fused_mlp",
)  # fmt: skip
_OFF = (
    "bert_context_fmha_fp32_acc", "fuse_fp4_quant", "multiple_profiles", "streamingllm", "norm_quant_fusion",
    "reduce_fusion", "user_buffer", "pp_reduce_scatter", "dora_plugin",
)  # fmt: skip
_TYPES = ["auto", "float16", "float32", "bfloat16", "int32", "disable"]
_PLUGINS = {
    "bert_attention_plugin": ("auto", _TYPES), "gpt_attention_plugin": ("auto", _TYPES),
    "gemm_plugin": (None, ["auto", "float16", "float32", "bfloat16", "int32", "fp8", "nvfp4", "disable"]),
    "gemm_swiglu_plugin": ("disable", ["fp8", "disable"]), "fp8_rowwise_gemm_plugin": ("disable", _TYPES),
    "lora_plugin": ("disable", _TYPES), "moe_plugin": ("auto", _TYPES), "mamba_conv1d_plugin": ("auto", _TYPES),
    "nccl_plugin": ("auto", _TYPES), "low_latency_gemm_plugin": ("disable", ["fp8", "disable"]),
    "low_latency_gemm_swiglu_plugin": ("disable", ["fp8", "disable"]),
    "gemm_allreduce_plugin": ("disable", ["float16", "bfloat16", "disable"]),
}  # fmt: skip


def parse_arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for name, default in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--max_seq_len", "--max_decoder_seq_len", dest="max_seq_len", type=int)
    parser.add_argument("--max_prompt_embedding_table_size", "--max_multimodal_len", type=int, default=0)
    parser.add_argument("--output_dir", default="engine_outputs")
    parser.add_argument("--output_timing_cache", default="model.cache")
    parser.add_argument("--kv_cache_type", type=str.upper, choices=["CONTINUOUS", "PAGED", "DISABLED"])
    parser.add_argument("--paged_kv_cache")
    parser.add_argument("--profiling_verbosity", default="layer_names_only")
    parser.add_argument("--log_level", default="info")
    parser.add_argument("--logits_dtype", choices=["float16", "float32"])
    parser.add_argument("--lora_dir", nargs="+")
    parser.add_argument("--lora_ckpt_source", default="hf", choices=["hf", "nemo"])
    parser.add_argument("--lora_target_modules", nargs="+")
    parser.add_argument("--speculative_decoding_mode")
    for name in _TEXTS:
        parser.add_argument(f"--{name}")
    for name in _SWITCHES:
        parser.add_argument(f"--{name}", action="store_true")
    for names, default in ((_ON, "enable"), (_OFF, "disable")):
        for name in names:
            parser.add_argument(f"--{name}", default=default, choices=["enable", "disable"])
    for name, (default, choices) in _PLUGINS.items():
        parser.add_argument(f"--{name}", default=default, choices=choices)
    return parser


def trouble(kind: str) -> str | None:
    """What FAKE_TRTLLM says of `kind`."""
    for word in os.environ.get("FAKE_TRTLLM", "").split():
        name, _, value = word.partition(":")
        if name == kind:
            return value
    return None


def log(text: str) -> None:
    sys.stdout.write(f"[11/22/2026-12:00:00] [TRT-LLM] [I] {text}\n")
    sys.stdout.flush()


def build_and_save(
    rank: int, gpu_id: int, ckpt_dir: str, build_config: dict[str, Any], output_dir: str, log_level: str,
    model_config: dict[str, Any], model_cls: Any, **kwargs: Any,
) -> bool:  # fmt: skip
    assert gpu_id == 0
    weights = Path(ckpt_dir) / f"rank{rank}.safetensors"
    log(f"Set nccl_plugin to {build_config['plugin_config']['nccl_plugin']}.")
    if not weights.is_file():
        raise RuntimeError(f"Required but not provided tensors: {{'{weights}'}}")
    config = _built(build_config, model_config)
    if trouble("oom") == str(rank):
        raise RuntimeError("CUDA out of memory. Tried to allocate 12.00 GiB. GPU 0 has 3.1 GiB free.")
    if trouble("crash") == str(rank):
        raise RuntimeError("Engine building failed, please check error log.")
    if trouble("kill") == str(rank):
        os.kill(os.getpid(), signal.SIGKILL)
    log("Total time of constructing network from module object 1.25 seconds")
    if trouble("sleep") == str(rank):
        time.sleep(60)
    log("Total time of building Unnamed Network 0: 00:00:10")
    _save(rank, Path(output_dir), config, model_config, weights)
    return True


def _built(build_config: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """What builder.py makes of flags that do not fit."""
    config = json.loads(json.dumps(build_config))
    plugins, quantization = config["plugin_config"], model["quantization"]
    fp8 = quantization["quant_algo"] == "FP8"
    fp8_cache = quantization["kv_cache_quant_algo"] == "FP8"
    plugins["paged_state"], plugins["nccl_plugin"] = (
        False,
        model["dtype"] if model["mapping"]["world_size"] > 1 else None,
    )
    plugins["paged_kv_cache"] = config["kv_cache_type"] == "PAGED"
    if config["max_seq_len"] is None:
        config["max_seq_len"] = model["max_position_embeddings"]
    config["max_input_len"] = min(config["max_input_len"], config["max_seq_len"])
    config["max_num_tokens"] = min(config["max_num_tokens"], config["max_seq_len"] * config["max_batch_size"])
    config["max_num_tokens"] = max(config["max_num_tokens"], plugins["tokens_per_block"])
    if model["mapping"]["tp_size"] == 1 or model["architecture"] != "LlamaForCausalLM":
        plugins["reduce_fusion"] = False
    if not fp8:
        plugins["use_fp8_context_fmha"] = False
        plugins["use_paged_context_fmha"] &= not fp8_cache
    elif plugins["use_paged_context_fmha"]:
        plugins["use_fp8_context_fmha"] = fp8_cache
    changed = trouble("change")
    if changed:
        name, _, value = changed.partition("=")
        place = plugins if name in plugins else config
        place[name] = json.loads(value)
    return config


def _save(rank: int, output: Path, config: dict[str, Any], model: dict[str, Any], weights: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        kept = {key: value for key, value in config.items() if key not in ("dry_run", "visualize_network")}
        content = {"version": VERSION, "pretrained_config": model, "build_config": kept}
        (output / "config.json").write_text(json.dumps(content, indent=4), encoding="utf-8")
        if config["output_timing_cache"]:
            Path(config["output_timing_cache"]).write_bytes(b"timing")
    if trouble("drop-rank") == str(rank):
        return
    log(f"Serializing engine to {output / f'rank{rank}.engine'}...")
    # Half of the file first: what a killed build leaves.
    with (output / f"rank{rank}.engine").open("wb") as stream:
        stream.write(b"ftrt")
        stream.flush()
        if trouble("half") == str(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble("empty") == str(rank):
            stream.truncate(0)
            return
        stream.write(f"rank {rank} of {weights.stat().st_size} bytes".encode())


def parallel_build(
    model_config: dict[str, Any], ckpt_dir: str, build_config: dict[str, Any], output_dir: str, workers: int = 1,
    log_level: str = "info", model_cls: Any = None, **kwargs: Any,
) -> None:  # fmt: skip
    for rank in range(model_config["mapping"]["world_size"]):
        build_and_save(rank, 0, ckpt_dir, build_config, output_dir, log_level, model_config, model_cls, **kwargs)


def main() -> None:
    args = vars(parse_arguments().parse_args())
    if args["multiple_profiles"] == "enable" and args["opt_num_tokens"] is not None:
        raise RuntimeError("multiple_profiles is enabled, while opt_num_tokens is set.")
    model = json.loads((Path(args["checkpoint_dir"]) / "config.json").read_text(encoding="utf-8"))
    if args["logits_dtype"] is not None:
        model["logits_dtype"] = args["logits_dtype"]
    plugins: dict[str, Any] = {"dtype": model["dtype"], "tokens_per_block": args["tokens_per_block"]}
    plugins |= {name: args[name] == "enable" for name in (*_ON, *_OFF)}
    plugins |= {name: None if args[name] == "disable" else args[name] for name in _PLUGINS}
    config: dict[str, Any] = {
        name: args[name]
        for name in (
            "max_input_len", "max_seq_len", "max_batch_size", "max_beam_width", "max_num_tokens", "opt_num_tokens",
            "max_prompt_embedding_table_size", "gather_context_logits", "gather_generation_logits", "weight_sparsity",
            "profiling_verbosity", "enable_debug_output", "max_draft_len", "input_timing_cache", "output_timing_cache",
            "dry_run", "visualize_network", "max_encoder_input_len", "weight_streaming", "monitor_memory",
        )
    }  # fmt: skip
    config |= {"kv_cache_type": args["kv_cache_type"] or "PAGED", "strongly_typed": True, "plugin_config": plugins}
    kwargs = {name: args[name] for name in ("logits_dtype", "use_fused_mlp", "lora_dir", "strip_plan")}
    parallel_build(model, args["checkpoint_dir"], config, args["output_dir"], args["workers"], **kwargs)
    log("Total time of building all engines: 00:00:12")


if __name__ == "__main__":
    sys.exit(main())
