"""The recipe that would produce an engine: what its config.json says, as `trtbuild compile` takes it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.engines.tensorrt_llm.flags import FLAGS, OURS, Facts, FlagValue, derive, problems
from trtbuild.migrate.engine_facts import EngineFacts, number
from trtbuild.migrate.model_guess import ModelSource

_PRECISIONS = {
    "FP8": "fp8", "FP8_PER_CHANNEL_PER_TOKEN": "fp8-dynamic", "W8A16": "int8", "W4A16": "int4",
    "W4A16_AWQ": "int4-awq", "W4A16_GPTQ": "int4-gptq",
}  # fmt: skip
_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
# Resolved by the build from the model, and of no effect on a decoder.
_NOT_ASKED = (
    "bert_attention_plugin",
    "bert_context_fmha_fp32_acc",
    "mamba_conv1d_plugin",
    "paged_state",
    "gpus_per_node",
)
SPECULATIVE_FLAGS = {
    "lookahead": "lookahead_decoding", "redrafter": "explicit_draft_tokens", "medusa": "medusa", "eagle": "eagle",
    "draft_tokens_external": "draft_tokens_external",
}  # fmt: skip


@dataclass
class RecipeDraft:
    """Fields of `trtbuild.engines.recipe.Recipe` with a comment where one is due, and notes that are no field."""

    fields: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    trtllm: dict[str, FlagValue] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def set(self, name: str, value: Any, comment: str = "") -> None:
        self.fields[name] = value
        if comment:
            self.comments[name] = comment

    def toml(self, header: list[str]) -> str:
        lines = [*(f"# {_one_line(line)}" for line in header), ""]
        for name, value in self.fields.items():
            comment = f"  # {_one_line(self.comments[name])}" if name in self.comments else ""
            lines.append(f"{name} = {_toml(value)}{comment}")
        if self.trtllm:
            lines += ["", "[trtllm]", *(f"{name} = {_toml(value)}" for name, value in self.trtllm.items())]
        lines += ["", *(f"# {_one_line(note)}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def draft_recipe(engine: EngineFacts, source: ModelSource) -> RecipeDraft:
    """A guessed model has to be confirmed by the user."""
    draft = RecipeDraft()
    draft.set("model", source.model, source.reason if source.is_certain else f"GUESS, confirm it: {source.reason}")
    if source.revision is not None:
        draft.set("revision", source.revision)
    _set_precision(draft, engine)
    _set_layout(draft, engine)
    draft.set("builder", "tensorrt-llm")
    for name in ("max_batch_size", "max_input_len"):
        if (limit := engine.limit(name)) is not None:
            draft.set(name, limit)
    if engine.max_seq_len is not None and engine.max_seq_len > 1:
        draft.set("max_seq_len", engine.max_seq_len)
    _set_flags(draft, engine)
    return draft


def _set_precision(draft: RecipeDraft, engine: EngineFacts) -> None:
    quant_algo, kv_cache = engine.quantization.get("quant_algo"), engine.quantization.get("kv_cache_quant_algo")
    dtype = str(engine.model.get("dtype"))
    if quant_algo in (None, "NO_QUANT"):
        kept = "" if dtype in _DTYPES else f"the engine's dtype is {dtype}"
        draft.set("precision", _DTYPES.get(dtype, "bf16"), kept)
        if engine.is_old:
            draft.comments["precision"] = "how the weights were quantized is not in a config.json before 0.8: check it"
    elif quant_algo in _PRECISIONS:
        draft.set("precision", _PRECISIONS[quant_algo], f"quant_algo {quant_algo}")
    else:
        draft.notes.append(
            f"precision: trtbuild has none for quant_algo {quant_algo}; without one it is the checkpoint's own. "
            "For W8A8 engines fp8 is nearest, for W4A8_AWQ and NVFP4 int4-awq"
        )
    if kv_cache == "FP8":
        draft.set("kv_cache", "fp8")
    elif kv_cache is not None:
        draft.notes.append(f"kv_cache: the engine has {kv_cache}, which trtbuild does not write; fp8 is nearest")


def _set_layout(draft: RecipeDraft, engine: EngineFacts) -> None:
    draft.set("tp", engine.tp)
    draft.set("pp", engine.pp)
    moe_ep, moe_tp = number(engine.mapping.get("moe_ep_size")), number(engine.mapping.get("moe_tp_size"))
    if _is_moe(engine) and moe_tp and moe_ep and moe_tp * moe_ep == engine.tp:
        draft.set("moe_tp", moe_tp)
        draft.set("moe_ep", moe_ep)
    if engine.cp > 1:
        draft.notes.append(f"layout: context parallelism ({engine.cp}) is not in a recipe")


def _is_moe(engine: EngineFacts) -> bool:
    moe = engine.model.get("moe")
    experts = moe.get("num_experts") if isinstance(moe, dict) else engine.model.get("moe_num_experts")
    return (number(experts) or 0) > 1


def _set_flags(draft: RecipeDraft, engine: EngineFacts) -> None:
    """What the build would not do by itself; a flag that 1.x would change or refuse is a note."""
    facts = Facts(
        architecture=str(engine.model.get("architecture")), dtype=str(engine.model.get("dtype")),
        quant_algo=_text(engine.quantization.get("quant_algo")),
        kv_cache_quant_algo=_text(engine.quantization.get("kv_cache_quant_algo")),
        is_moe=_is_moe(engine), tp=engine.tp, pp=engine.pp,
        max_batch_size=engine.limit("max_batch_size") or 8, max_input_len=engine.limit("max_input_len") or 1024,
        max_seq_len=engine.max_seq_len or 2048,
    )  # fmt: skip
    ours, always = derive(facts, {}), set(problems(facts, {}))
    for name, value in _engine_flags(engine):
        default = ours.get(name, FLAGS[name].default)
        if name in OURS or value in (default, None) or {value, default} <= {"auto", facts.dtype}:
            continue
        changed = [problem for problem in problems(facts, {**draft.trtllm, name: value}) if problem not in always]
        if changed and value == FLAGS[name].default:
            continue
        if changed:
            draft.notes.append(f"left out: {name} = {value}: {changed[0]}")
        else:
            draft.trtllm[name] = value


def _engine_flags(engine: EngineFacts) -> Iterator[tuple[str, FlagValue | None]]:
    """Flags of trtllm-build that the engine's config.json tells the values of."""
    for name, flag in FLAGS.items():
        if name in _NOT_ASKED or (name == "nccl_plugin" and engine.world_size == 1):
            continue
        read = _SPECIAL.get(name)
        if read is not None:
            yield name, read(engine)
        elif name in engine.plugins:
            yield name, _plugin_value(flag.kind, engine.plugins[name])
        elif flag.kind == "switch":
            yield name, bool(engine.build.get(name))
        elif flag.kind == "number":
            yield name, number(engine.build.get(name))


def _plugin_value(kind: str, value: object) -> FlagValue | None:
    if kind == "number":
        return number(value)
    if isinstance(value, bool):
        return "enable" if value else "disable"
    return "disable" if value is None else _text(value)


def _opt_num_tokens(engine: EngineFacts) -> int | None:
    """The build writes batch x beam where nobody asked for anything else, and has no use for it in several profiles."""
    found = None if engine.plugins.get("multiple_profiles") else engine.limit("opt_num_tokens")
    return None if found == (engine.limit("max_batch_size") or 0) * engine.max_beam_width else found


def _lora(engine: EngineFacts) -> Mapping[str, Any]:
    config = engine.build.get("lora_config")
    return config if isinstance(config, dict) and engine.has_lora else {}


def _lora_modules(engine: EngineFacts) -> str | None:
    modules = _lora(engine).get("lora_target_modules")
    return " ".join(map(str, modules)) if isinstance(modules, list) and modules else None


_SPECIAL: dict[str, Callable[[EngineFacts], FlagValue | None]] = {
    "kv_cache_type": lambda engine: "paged" if engine.has_paged_kv_cache else "continuous",
    "logits_dtype": lambda engine: "float16" if engine.logits_type == "FP16" else "float32",
    "opt_num_tokens": _opt_num_tokens,
    "strip_plan": lambda engine: bool(engine.build.get("use_strip_plan")),
    "dry_run": lambda _: None, "monitor_memory": lambda _: None, "fast_build": lambda _: None,
    "gather_all_token_logits": lambda _: None, "enable_debug_output": lambda _: None, "workers": lambda _: None,
    "auto_parallel": lambda _: None,
    "max_encoder_input_len": lambda _: None,
    "lora_target_modules": _lora_modules,
    "max_lora_rank": lambda engine: number(_lora(engine).get("max_lora_rank")),
    "lora_ckpt_source": lambda engine: _text(_lora(engine).get("lora_ckpt_source")),
    "speculative_decoding_mode": lambda engine: SPECULATIVE_FLAGS.get(engine.speculative_mode or ""),
    "profiling_verbosity": lambda engine: _text(engine.build.get("profiling_verbosity")),
}  # fmt: skip


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _toml(value: Any) -> str:
    """Strings, numbers and booleans: JSON's form of them is TOML's, but for DEL and lone surrogates."""
    if isinstance(value, str):
        value = value.encode("utf-8", "replace").decode().replace("\x7f", "?")
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value)


def _one_line(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)
