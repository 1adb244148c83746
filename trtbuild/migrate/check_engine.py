"""The engine model's settings against the engine: paths, ranks, limits, features."""

from __future__ import annotations

import itertools

from trtbuild.errors import CheckpointError
from trtbuild.migrate.check_parameters import parse_bool, parse_float, parse_groups, parse_int, parse_ints
from trtbuild.migrate.engine_facts import EngineFacts
from trtbuild.migrate.findings import Findings, Severity, plural
from trtbuild.migrate.models import TritonModel
from trtbuild.migrate.parameters import PARAMETERS, SPECULATIVE_MODES
from trtbuild.migrate.paths import Places
from trtbuild.migrate.recipe_writer import SPECULATIVE_FLAGS
from trtbuild.migrate.release import Release

_LORA_PARAMETERS = (
    "lora_cache_optimal_adapter_size", "lora_cache_max_adapter_size", "lora_cache_gpu_memory_fraction",
    "lora_cache_host_memory_bytes", "lora_prefetch_dir",
)  # fmt: skip
_COMPILE = "build the engine again: trtbuild compile RECIPE"
_LOGITS = ("context_logits", "generation_logits", "draft_logits")


def open_engine(model: TritonModel, places: Places, findings: Findings) -> EngineFacts | None:
    """The engine of gpt_model_path (or of encoder_model_path, where that is all there is)."""
    key = "gpt_model_path" if model.parameter("gpt_model_path") else "encoder_model_path"
    text = model.parameter(key)
    if text is None:
        return None
    line = model.line_of(key)
    directory = places.find(text)
    if directory is None:
        findings.add(
            "error", "engine_path", model.file, key, text, "an engine directory",
            "there is no such directory here; where the container has it elsewhere, say --mount CONTAINER=HERE", line,
        )  # fmt: skip
        return None
    try:
        engine = EngineFacts.open(directory)
        _check_ranks(model, engine, text, findings)
    except (CheckpointError, OSError) as error:
        reason = error.message if isinstance(error, CheckpointError) else error.strerror
        findings.add(
            "error", "engine_path", model.file, key, f"{text}: {reason}",
            "a directory with config.json and rank0.engine",
            "point it at what trtllm-build wrote", line,
        )  # fmt: skip
        return None
    if engine.is_old:
        findings.add(
            "error", "old_engine", model.file, key, "an engine of a release before 0.8", "one of 0.8 to 1.2",
            "its config.json is read as far as it goes; build the engine again from the checkpoint", line,
        )  # fmt: skip
    return engine


def _check_ranks(model: TritonModel, engine: EngineFacts, text: str, findings: Findings) -> None:
    ranks, found = engine.world_size, engine.rank_files()
    # The number comes out of a file: no list of that length is made.
    missing = list(itertools.islice((rank for rank in range(ranks) if rank not in found), 8))
    if not missing and len(found) == ranks:
        return
    names = ", ".join(f"rank{rank}.engine" for rank in missing)
    findings.add(
        "error", "rank_files", model.file, "gpt_model_path", f"{len(found)} rank files in {text}",
        f"{engine.world_size}, one for each rank (tp {engine.tp} x pp {engine.pp})",
        f"missing: {names}; copy or build them" if missing else "remove the rank files of another build",
        model.line_of("gpt_model_path"),
    )  # fmt: skip


class EngineChecks:
    """The checks of one model against its engine; each adds what it finds.

    `wrong`: parameters that do not fit the engine, and what would; no new repository is to have them.
    """

    def __init__(self, model: TritonModel, engine: EngineFacts, release: Release | None, findings: Findings) -> None:
        self.model, self.engine, self.release, self.findings = model, engine, release, findings
        self.wrong: dict[str, str] = {}

    def run(self, world_size: int | None) -> None:
        self.limits()
        self.cache()
        self.features()
        self.decoding()
        self.logits()
        self.ranks(world_size)

    def _add(self, severity: Severity, check: str, key: str, found: object, allowed: str, fix: str) -> None:
        self.wrong.setdefault(key, allowed)
        self.findings.add(severity, check, self.model.file, key, found, allowed, fix, self.model.line_of(key))

    def limits(self) -> None:
        batch, allowed = self.model.max_batch_size, self.engine.limit("max_batch_size")
        if batch is not None and allowed is not None and batch > allowed:
            value = self.model.root.value("max_batch_size")
            self.findings.add(
                "error", "max_batch_size", self.model.file, "max_batch_size", batch, f"at most the engine's {allowed}",
                f"write {allowed} in all models, or {_COMPILE} --max-batch-size {batch}",
                value.line if value else None,
            )  # fmt: skip
        beams = parse_int(self.model.parameter("max_beam_width"))
        if beams is not None and beams > self.engine.max_beam_width:
            self._add(
                "error", "max_beam_width", "max_beam_width", beams,
                f"at most the engine's {self.engine.max_beam_width}",
                f"write {self.engine.max_beam_width}, or {_rebuild(f'max_beam_width={beams}')}",
            )  # fmt: skip

    def cache(self) -> None:
        max_seq_len = self.engine.max_seq_len
        windows = parse_ints(self.model.parameter("max_attention_window_size"))
        if windows and max_seq_len and max(windows) > max_seq_len:
            self._add(
                "warning", "attention_window", "max_attention_window_size", max(windows),
                f"at most the engine's max_seq_len {max_seq_len}",
                f"write {max_seq_len} or less: the runtime cuts it to that",
            )  # fmt: skip
        tokens = parse_int(self.model.parameter("max_tokens_in_paged_kv_cache"))
        if tokens is not None and max_seq_len and tokens < max_seq_len:
            self._add(
                "warning", "kv_cache_tokens", "max_tokens_in_paged_kv_cache", tokens,
                f"at least the engine's max_seq_len {max_seq_len}",
                "raise it, or leave it empty: a request of full length never gets in",
            )  # fmt: skip
        is_inflight = self.model.parameter("gpt_model_type") in ("inflight_fused_batching", "inflight_batching")
        for has, key, what, flag in (
            (self.engine.has_paged_kv_cache, "kv_cache_type", "a paged KV cache", "kv_cache_type=paged"),
            (self.engine.has_packed_input, "remove_input_padding", "packed input", "remove_input_padding=enable"),
        ):
            if is_inflight and not has:
                self._add(
                    "error", "inflight_batching", "gpt_model_type", f"an engine without {what} ({key})",
                    f"in-flight batching needs {what}", _rebuild(flag),
                )  # fmt: skip
        self._reuse()

    def _reuse(self) -> None:
        reuse = parse_bool(self.model.parameter("enable_kv_cache_reuse"))
        offload = parse_int(self.model.parameter("kv_cache_host_memory_bytes")) or 0
        is_by_default = reuse is None and self.release is not None and self.release.minor >= (1, 0)
        if reuse and self.engine.quantization.get("kv_cache_quant_algo") == "INT8":
            self._add(
                "warning", "kv_cache_reuse", "enable_kv_cache_reuse", "true, and an INT8 KV cache",
                "false, or an fp8 or 16-bit KV cache",
                "INT8 KV does not go with the paged context attention of reuse (TensorRT-LLM #2166): write false",
            )  # fmt: skip
        elif reuse is False and offload:
            self._add(
                "warning", "kv_cache_host_memory", "kv_cache_host_memory_bytes", offload, "0 without KV cache reuse",
                "offloaded blocks are only ever used again by reuse: set enable_kv_cache_reuse true, or 0 here",
            )  # fmt: skip
        if self.engine.has_paged_context_attention:
            return
        if reuse:
            self._add(
                "error", "kv_cache_reuse", "enable_kv_cache_reuse", "true", "false for this engine",
                f"write false, or {_rebuild('use_paged_context_fmha=enable')}",
            )  # fmt: skip
        elif is_by_default:
            self._add(
                "warning", "kv_cache_reuse", "enable_kv_cache_reuse", "not set, which 1.x takes as true",
                "false for this engine", f"write false, or {_rebuild('use_paged_context_fmha=enable')}",
            )  # fmt: skip

    def features(self) -> None:
        if parse_bool(self.model.parameter("enable_chunked_context")) and not self.engine.has_paged_context_attention:
            self._add(
                "error", "chunked_context", "enable_chunked_context", "true", "false for this engine",
                f"write false, or {_rebuild('use_paged_context_fmha=enable')}",
            )  # fmt: skip
        lora = [name for name in _LORA_PARAMETERS if self.model.parameter(name) is not None]
        if lora and not self.engine.has_lora:
            self.wrong |= dict.fromkeys(lora, "nothing without a LoRA plugin")
            self._add(
                "warning", "lora", lora[0], ", ".join(lora), "nothing: the engine has no LoRA plugin",
                f"remove it, or {_rebuild('lora_plugin=auto', 'lora_target_modules=...')}",
            )  # fmt: skip
        percent = parse_float(self.model.parameter("gpu_weights_percent"))
        if percent is not None and percent < 1 and not self.engine.build.get("weight_streaming"):
            self._add(
                "error", "weight_streaming", "gpu_weights_percent", percent, "1.0 for this engine",
                f"leave it empty, or {_rebuild('weight_streaming=true')}",
            )  # fmt: skip
        if self.model.parameter("cross_kv_cache_fraction") and not self.model.parameter("encoder_model_path"):
            self._add(
                "error", "cross_kv_cache", "cross_kv_cache_fraction", self.model.parameter("cross_kv_cache_fraction"),
                "nothing without an encoder", "leave it empty: it is for encoder-decoder models",
            )  # fmt: skip
        guided, info = self.model.parameter("guided_decoding_backend"), "xgrammar_tokenizer_info_path"
        is_read = PARAMETERS["tensorrt_llm"]["guided_decoding_backend"].is_read_by(self.release)
        if guided and is_read and self.model.backend == "tensorrtllm" and not self.model.parameter(info):
            self._add(
                "warning", "guided_decoding", "guided_decoding_backend", guided, f"{info} beside it",
                f"set {info}: without it guided decoding stays off",
            )  # fmt: skip

    def decoding(self) -> None:
        mode, built = self.model.parameter("decoding_mode"), self.engine.speculative_mode
        if mode in SPECULATIVE_MODES and built != mode:
            self._add(
                "warning", "decoding_mode", "decoding_mode", mode,
                f"the engine was built for {built or 'no speculation'}",
                f"leave it empty, or {_rebuild(f'speculative_decoding_mode={SPECULATIVE_FLAGS[mode]}')}",
            )  # fmt: skip
        elif mode == "lookahead":
            names = [f"lookahead_{part}" for part in ("window_size", "ngram_size", "verification_set_size")]
            missing = [name for name in names if parse_int(self.model.parameter(name)) is None]
            if missing:
                self.wrong["decoding_mode"] = f"lookahead with {', '.join(names)} only"
                self._add(
                    "error", "decoding_mode", missing[0], "missing: " + ", ".join(missing),
                    "numbers, with decoding_mode lookahead",
                    "set all three; the model does not load without them",
                )  # fmt: skip
        beams = parse_int(self.model.parameter("max_beam_width"))
        if mode in ("top_k", "top_p", "top_k_top_p") and beams is not None and 1 < beams <= self.engine.max_beam_width:
            self._add(
                "warning", "decoding_mode", "decoding_mode", f"{mode}, and max_beam_width {beams}",
                "beam_search, or max_beam_width 1",
                "leave one of the two out: sampling modes answer with one beam",
            )  # fmt: skip

    def logits(self) -> None:
        """One finding, whichever of the tensors has the other type."""
        tensors = [t for t in (*self.model.outputs.values(), *self.model.inputs.values()) if t.name in _LOGITS]
        wrong = [t for t in tensors if t.type in ("FP16", "FP32") and t.type != self.engine.logits_type]
        if wrong:
            other = "float16" if wrong[0].type == "FP16" else "float32"
            self.findings.add(
                "error", "logits_datatype", self.model.file, "logits_datatype",
                f"TYPE_{wrong[0].type} ({', '.join(t.name for t in wrong)})",
                f"TYPE_{self.engine.logits_type}: the engine's logits_dtype is "
                f"{self.engine.model.get('logits_dtype') or 'float32'}",
                f"write TYPE_{self.engine.logits_type} in all models, or {_rebuild(f'logits_dtype={other}')}",
                wrong[0].line,
            )  # fmt: skip

    def ranks(self, world_size: int | None) -> None:
        """MPI ranks, GPUs and participants: as many as the engine has ranks."""
        ranks = self.engine.world_size
        layout = f"{ranks}, the engine's tp {self.engine.tp} x pp {self.engine.pp}"
        if world_size is not None and world_size != ranks:
            self.findings.add(
                "error", "world_size", self.model.file, "--world-size", world_size, layout,
                f"start {ranks} ranks (mpirun -n {ranks}, launch_triton_server.py --world_size {ranks})",
            )  # fmt: skip
        instances = self._instances()
        for key in ("gpu_device_ids", "participant_ids"):
            groups = parse_groups(self.model.parameter(key))
            if groups is None:
                continue
            wrong = next((group for group in groups if len(group) != ranks), None)
            if wrong is not None:
                self._add(
                    "error", key, key, f"{len(wrong)}: {','.join(map(str, wrong))}", f"{layout}, for each instance",
                    f"name {ranks} of them; instances are separated by semicolons",
                )  # fmt: skip
            elif any(len(set(group)) != len(group) for group in groups):
                self._add("error", key, key, self.model.parameter(key), "each one once", "name each one once")
            elif len(groups) not in (1, instances):
                self._add(
                    "warning", key, key, f"{len(groups)} groups, {plural(instances, 'instance')}",
                    "a group for each instance",
                    f"set instance_group count to {len(groups)}, or name {plural(instances, 'group')}",
                )  # fmt: skip

    def _instances(self) -> int:
        counts = [group.value("count") for group in self.model.root.messages("instance_group")]
        return sum(value.number or 1 for value in counts if value is not None) or 1


def _rebuild(*flags: str) -> str:
    """As `trtbuild compile` takes the flags of trtllm-build."""
    return " ".join([_COMPILE, *(f"--trtllm {flag}" for flag in flags)])
