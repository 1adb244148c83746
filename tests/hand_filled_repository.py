"""Repositories as people fill them by hand, in the layouts of several releases; tests then make mistakes in them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtllm_engine import make_trtllm_engine

from trtbuild.checkpoints.layout import Layout

RELEASES = ("0.8.0", "0.11.0", "0.17.0", "1.2.1")

# name: (type, dims, optional)
TensorTable = dict[str, tuple[str, str, bool]]


@dataclass
class ModelText:
    """What one config.pbtxt says."""

    backend: str = 'backend: "python"'
    max_batch_size: str = "4"
    extra: list[str] = field(default_factory=list)
    inputs: TensorTable = field(default_factory=dict)
    outputs: TensorTable = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    steps: dict[str, tuple[dict[str, str], dict[str, str]]] = field(default_factory=dict)

    def text(self, name: str) -> str:
        lines = [f'name: "{name}"', self.backend, f"max_batch_size: {self.max_batch_size}", *self.extra]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines.append(f"{kind} [")
            lines.append(",\n".join(_tensor(name, *entry) for name, entry in tensors.items()))
            lines.append("]")
        for key, value in self.parameters.items():
            lines.append(f'parameters: {{\n  key: "{key}"\n  value: {{\n    string_value: "{value}"\n  }}\n}}')
        if self.steps:
            steps = ",\n".join(_step(model, *maps) for model, maps in self.steps.items())
            lines.append(f"ensemble_scheduling {{\n  step [\n{steps}\n  ]\n}}")
        return "# filled by hand\n\n" + "\n".join(lines) + "\n"


def _tensor(name: str, type_: str, dims: str, optional: bool) -> str:
    more = "\n    optional: true" if optional else ""
    return f'  {{\n    name: "{name}"\n    data_type: {type_}\n    dims: [ {dims} ]{more}\n  }}'


def _step(model: str, inputs: dict[str, str], outputs: dict[str, str]) -> str:
    maps = [f'input_map {{ key: "{k}" value: "{v}" }}' for k, v in inputs.items()]
    maps += [f'output_map {{ key: "{k}" value: "{v}" }}' for k, v in outputs.items()]
    # Upstream's templates have stray commas between some of them, which text format allows.
    return f'    {{\n      model_name: "{model}"\n      model_version: -1\n      ' + ",\n      ".join(maps) + "\n    }"


def _required(type_: str, *names: str, dims: str = "1") -> TensorTable:
    return dict.fromkeys(names, (f"TYPE_{type_}", dims, False))


def _optional(type_: str, *names: str, dims: str = "1") -> TensorTable:
    return dict.fromkeys(names, (f"TYPE_{type_}", dims, True))


@dataclass
class HandFilled:
    """A repository in memory: `models` by directory name, and its engine. `write` puts it on disk."""

    root: Path
    release: str
    models: dict[str, ModelText]
    engine: Path
    without: set[str] = field(default_factory=set)
    """Files, relative to the root, that are not written."""

    def write(self) -> Path:
        for name, model in self.models.items():
            version = self.root / name / "1"
            version.mkdir(parents=True, exist_ok=True)
            (self.root / name / "config.pbtxt").write_text(model.text(name), encoding="utf-8")
            if 'backend: "python"' in model.backend:
                (version / "model.py").write_text("class TritonPythonModel: ...\n", encoding="utf-8")
        for file in self.without:
            path = self.root / file
            path.rmdir() if path.is_dir() else path.unlink()
        return self.root

    def edit_engine(self, **sections: dict[str, Any]) -> None:
        """Fields of config.json: `pretrained`, `build`, `plugins`, `quantization`, `mapping`, `top`."""
        file = self.engine / "config.json"
        data = json.loads(file.read_text(encoding="utf-8"))
        places = {
            "top": data, "pretrained": data["pretrained_config"], "build": data["build_config"],
            "plugins": data["build_config"]["plugin_config"], "quantization": data["pretrained_config"]["quantization"],
            "mapping": data["pretrained_config"]["mapping"],
        }  # fmt: skip
        for section, fields in sections.items():
            for key, value in fields.items():
                places[section].pop(key, None) if value is ... else places[section].update({key: value})
        file.write_text(json.dumps(data), encoding="utf-8")


def hand_filled(root: Path, release: str = "1.2.1", layout: Layout | None = None) -> HandFilled:
    """One without a mistake. The engine lies in `root`'s sibling `engine`, with its tokenizer."""
    minor = tuple(int(part) for part in release.split(".")[:2])
    engine = make_trtllm_engine(root.parent / "engine", version=release, layout=layout)
    repository = HandFilled(root, release, {}, engine)
    if minor < (0, 11):
        # Prompt and answer apart, no kv_cache_type.
        limits = {"max_seq_len": ..., "max_output_len": 100, "max_input_len": 156}
        repository.edit_engine(build={**limits, "kv_cache_type": ...})
    tokenizer = str(engine / "tokenizer")
    repository.models = {
        "preprocessing": _preprocessing(minor, tokenizer),
        "tensorrt_llm": _tensorrt_llm(minor, str(engine)),
        "postprocessing": _postprocessing(minor, tokenizer),
        "ensemble": _ensemble(minor),
        "tensorrt_llm_bls": _bls(minor),
    }
    return repository


def _preprocessing(minor: tuple[int, ...], tokenizer: str) -> ModelText:
    dims = "-1" if minor < (0, 9) else "1"
    model = ModelText(parameters={"tokenizer_dir": tokenizer})
    model.inputs = _required("STRING", "QUERY", dims=dims) | _required("INT32", "REQUEST_OUTPUT_LEN", dims=dims)
    model.inputs |= _optional("STRING", "BAD_WORDS_DICT", "STOP_WORDS_DICT", dims="-1")
    model.outputs = _required("INT32", "INPUT_ID", "REQUEST_OUTPUT_LEN", dims="-1")
    model.outputs |= _required("INT32", "REQUEST_INPUT_LEN")
    model.outputs |= _required("INT32", "BAD_WORDS_IDS", "STOP_WORDS_IDS", dims="2, -1")
    if minor < (0, 10):
        model.parameters["tokenizer_type"] = "auto"
    else:
        model.parameters["add_special_tokens"] = "${add_special_tokens}"
        model.inputs |= _optional("INT32", "END_ID", "PAD_ID")
        model.outputs |= _required("INT32", "OUT_END_ID", "OUT_PAD_ID")
    model.extra = ["instance_group [ { count: 2 kind: KIND_CPU } ]"]
    return model


def _postprocessing(minor: tuple[int, ...], tokenizer: str) -> ModelText:
    model = ModelText(parameters={"tokenizer_dir": tokenizer})
    model.inputs = _required("INT32", "TOKENS_BATCH", dims="-1, -1") | _required("INT32", "SEQUENCE_LENGTH", dims="-1")
    model.outputs = _required("STRING", "OUTPUT", dims="-1")
    if minor < (0, 17):
        model.inputs |= _optional("FP32", "CUM_LOG_PROBS", dims="-1")
        model.outputs |= _required("FP32", "OUT_CUM_LOG_PROBS", dims="-1")
    if minor < (0, 10):
        model.parameters["tokenizer_type"] = "auto"
    else:
        model.parameters["skip_special_tokens"] = "true"
    return model


def _names(minor: tuple[int, ...]) -> tuple[str, str]:
    return ("min_length", "random_seed") if minor < (0, 18) else ("min_tokens", "seed")


def _tensorrt_llm(minor: tuple[int, ...], engine: str) -> ModelText:
    shortest, seed = _names(minor)
    model = ModelText(backend='backend: "tensorrtllm"')
    model.extra = [
        "model_transaction_policy {\n  decoupled: false\n}",
        "dynamic_batching {\n  preferred_batch_size: [ 4 ]\n  max_queue_delay_microseconds: 100\n}",
        "instance_group [\n  {\n    count: 1\n    kind : KIND_CPU\n  }\n]",
    ]
    model.inputs = _required("INT32", "input_ids", dims="-1")
    model.inputs |= _required("INT32", "input_lengths", "request_output_len")
    model.inputs |= _optional("INT32", "end_id", "pad_id", "beam_width", "runtime_top_k", shortest)
    model.inputs |= _optional("INT32", "stop_words_list", "bad_words_list", dims="2, -1")
    model.inputs |= _optional("FP32", "temperature", "runtime_top_p", "len_penalty", "repetition_penalty")
    model.inputs |= _optional("UINT64", seed) | _optional("BOOL", "stop", "streaming", "return_log_probs")
    model.inputs |= _optional("FP32", "draft_logits", dims="-1, -1")
    model.outputs = _required("INT32", "output_ids", dims="-1, -1") | _required("INT32", "sequence_length", dims="-1")
    model.outputs |= _required("FP32", "cum_log_probs", dims="-1")
    model.outputs |= _required("FP32", "context_logits", dims="-1, -1")
    model.outputs |= _required("FP32", "generation_logits", dims="-1, -1, -1")
    model.parameters = {
        "max_beam_width": "1", "FORCE_CPU_ONLY_INPUT_TENSORS": "no", "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": engine, "max_tokens_in_paged_kv_cache": "", "max_attention_window_size": "",
        "batch_scheduler_policy": "max_utilization", "kv_cache_free_gpu_mem_fraction": "0.85",
        "exclude_input_in_output": "True", "enable_kv_cache_reuse": "true", "normalize_log_probs": "true",
        "enable_chunked_context": "${enable_chunked_context}", "gpu_device_ids": "", "decoding_mode": "top_k_top_p",
    }  # fmt: skip
    if minor >= (0, 11):
        model.parameters["executor_worker_path"] = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
        model.parameters["medusa_choices"] = "${medusa_choices}"
    if minor >= (0, 17):
        model.parameters |= {"encoder_model_path": "${encoder_engine_dir}", "eagle_choices": "${eagle_choices}"}
        model.inputs |= _optional("BOOL", "exclude_input_in_output")
    if minor >= (1, 0):
        model.parameters |= {"guided_decoding_backend": "${guided_decoding_backend}", "multi_block_mode": "true"}
        model.parameters |= {"tokenizer_dir": "", "xgrammar_tokenizer_info_path": ""}
        model.inputs |= _optional("STRING", "guided_decoding_guide_type", "guided_decoding_guide")
    return model


def _text_tensors(minor: tuple[int, ...]) -> tuple[TensorTable, TensorTable]:
    shortest, seed = _names(minor)
    dims = "-1" if minor < (0, 9) else "1"
    inputs = _required("STRING", "text_input", dims=dims) | _required("INT32", "max_tokens", dims=dims)
    inputs |= _optional("STRING", "bad_words", "stop_words", dims="-1")
    inputs |= _optional("INT32", "end_id", "pad_id", "top_k", "beam_width", shortest)
    inputs |= _optional("FP32", "top_p", "temperature", "length_penalty", "repetition_penalty")
    inputs |= _optional("UINT64", seed) | _optional("BOOL", "stream", "return_log_probs")
    outputs = _required("STRING", "text_output", dims="-1") | _required("FP32", "cum_log_probs", dims="-1")
    outputs |= _required("FP32", "context_logits", dims="-1, -1")
    return inputs, outputs


def _ensemble(minor: tuple[int, ...]) -> ModelText:
    shortest, seed = _names(minor)
    model = ModelText(backend='platform: "ensemble"')
    model.inputs, model.outputs = _text_tensors(minor)
    before = {"QUERY": "text_input", "REQUEST_OUTPUT_LEN": "max_tokens"}
    before |= {"BAD_WORDS_DICT": "bad_words", "STOP_WORDS_DICT": "stop_words"}
    made = ["INPUT_ID", "REQUEST_INPUT_LEN", "REQUEST_OUTPUT_LEN", "BAD_WORDS_IDS", "STOP_WORDS_IDS"]
    engine = {
        "input_ids": "_INPUT_ID", "input_lengths": "_REQUEST_INPUT_LEN", "request_output_len": "_REQUEST_OUTPUT_LEN",
        "bad_words_list": "_BAD_WORDS_IDS", "stop_words_list": "_STOP_WORDS_IDS", "runtime_top_k": "top_k",
        "runtime_top_p": "top_p", "temperature": "temperature", "len_penalty": "length_penalty", seed: seed,
        "repetition_penalty": "repetition_penalty", "beam_width": "beam_width", "streaming": "stream",
        shortest: shortest, "end_id": "end_id", "pad_id": "pad_id",
    }  # fmt: skip
    answer = {"output_ids": "_TOKENS_BATCH", "sequence_length": "_SEQUENCE_LENGTH", "context_logits": "context_logits"}
    after = {"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"}
    text = {"OUTPUT": "text_output"}
    if minor < (0, 17):
        answer["cum_log_probs"] = "_CUM_LOG_PROBS"
        after["CUM_LOG_PROBS"] = "_CUM_LOG_PROBS"
        text["OUT_CUM_LOG_PROBS"] = "cum_log_probs"
    else:
        answer["cum_log_probs"] = "cum_log_probs"
    if minor >= (0, 10):
        before |= {"END_ID": "end_id", "PAD_ID": "pad_id"}
        made += ["OUT_END_ID", "OUT_PAD_ID"]
        engine |= {"end_id": "_OUT_END_ID", "pad_id": "_OUT_PAD_ID"}
    model.steps = {
        "preprocessing": (before, {name: f"_{name}" for name in made}),
        "tensorrt_llm": (engine, answer),
        "postprocessing": (after, text),
    }
    return model


def _bls(minor: tuple[int, ...]) -> ModelText:
    model = ModelText(extra=["model_transaction_policy {\n  decoupled: false\n}"])
    model.inputs, model.outputs = _text_tensors(minor)
    model.inputs |= _optional("INT32", "num_draft_tokens") | _optional("BOOL", "use_draft_logits")
    model.parameters = {
        "accumulate_tokens": "false", "tensorrt_llm_model_name": "tensorrt_llm",
        "tensorrt_llm_draft_model_name": "${tensorrt_llm_draft_model_name}",
    }  # fmt: skip
    return model


def config_files(root: Path) -> Iterator[Path]:
    return iter(sorted(root.glob("*/config.pbtxt")))
