"""Every mistake gives exactly its finding, on top of what the repository without it gives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hand_filled_repository import hand_filled
from repository_changes import (
    BLS,
    ENGINE,
    ENSEMBLE,
    POST,
    PRE,
    Change,
    batch,
    both,
    directory_renamed,
    dropped,
    engine,
    engine_file,
    extra,
    findings_of,
    map_renamed,
    no_paged_attention,
    old_engine,
    parameter,
    renamed,
    replaced,
    script,
    second_engine,
    source,
    tensor,
    tensor_renamed,
)

from trtbuild.checkpoints.layout import Layout
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt_llm.flags import Facts, problems
from trtbuild.migrate.findings import Finding


@dataclass(frozen=True)
class Mistake:
    name: str
    change: Change
    expected: tuple[str, str, str, str]
    """(severity, check, file, key)"""
    found: str = ""
    """Part of what the finding quotes or proposes."""
    release: str = "1.2.1"
    after: Change | None = None
    """On what is written."""
    options: dict[str, Any] = field(default_factory=dict)


MISTAKES = [
    # What is left of the template.
    Mistake("number_placeholder", batch("${triton_max_batch_size}", "tensorrt_llm"),
            ("error", "placeholder", ENGINE, "max_batch_size"), "${triton_max_batch_size}"),
    Mistake("decoupled_placeholder", replaced("tensorrt_llm", "false", "${decoupled_mode}"),
            ("error", "placeholder", ENGINE, "model_transaction_policy.decoupled"), "${decoupled_mode}"),
    Mistake("type_placeholder", tensor("ensemble", "context_logits", "${logits_datatype}", "-1, -1"),
            ("error", "placeholder", ENSEMBLE, "output.context_logits.data_type"), "${logits_datatype}"),
    Mistake("engine_dir_placeholder", parameter("gpt_model_path", "${engine_dir}"),
            ("error", "placeholder", ENGINE, "gpt_model_path"), "${engine_dir}"),
    Mistake("strategy_placeholder", parameter("gpt_model_type", "${batching_strategy}"),
            ("error", "placeholder", ENGINE, "gpt_model_type")),
    Mistake("tokenizer_placeholder", parameter("tokenizer_dir", "${tokenizer_dir}", "preprocessing"),
            ("error", "placeholder", PRE, "tokenizer_dir")),
    Mistake("optional_placeholder", parameter("sink_token_length", "${sink_token_length}"),
            ("info", "placeholder", ENGINE, "sink_token_length"), "taken as not set: 0"),
    # Names and values of parameters.
    Mistake("camel_case", renamed("max_tokens_in_paged_kv_cache", "maxTokensInPagedKvCache"),
            ("error", "parameter_name", ENGINE, "maxTokensInPagedKvCache"), "max_tokens_in_paged_kv_cache"),
    Mistake("from_output", renamed("exclude_input_in_output", "exclude_input_from_output"),
            ("error", "parameter_name", ENGINE, "exclude_input_from_output"), "exclude_input_in_output"),
    Mistake("engine_dir_as_name", renamed("gpt_model_path", "engine_dir"),
            ("error", "parameter_name", ENGINE, "engine_dir"), "gpt_model_path"),
    Mistake("misspelled", renamed("kv_cache_free_gpu_mem_fraction", "kv_cache_free_gpu_mem_fracton"),
            ("error", "parameter_name", ENGINE, "kv_cache_free_gpu_mem_fracton"), "kv_cache_free_gpu_mem_fraction"),
    Mistake("misspelled_python", renamed("tokenizer_dir", "tokeniser_dir", "postprocessing"),
            ("error", "parameter_name", POST, "tokeniser_dir"), "tokenizer_dir"),
    Mistake("unknown", parameter("warp_speed", "9"), ("warning", "parameter_name", ENGINE, "warp_speed")),
    Mistake("old_worker_path", parameter("worker_path", "/opt/worker"),
            ("warning", "parameter_release", ENGINE, "worker_path"), "executor_worker_path"),
    Mistake("new_in_old_release", parameter("guided_decoding_backend", "xgrammar"),
            ("warning", "parameter_release", ENGINE, "guided_decoding_backend"), "0.11.0", release="0.11.0"),
    Mistake("bool_value", parameter("enable_kv_cache_reuse", "yes"),
            ("warning", "parameter_value", ENGINE, "enable_kv_cache_reuse"), "true or false"),
    Mistake("int_value", parameter("max_beam_width", "one"), ("warning", "parameter_value", ENGINE, "max_beam_width")),
    Mistake("share_value", parameter("kv_cache_free_gpu_mem_fraction", "85"),
            ("error", "parameter_value", ENGINE, "kv_cache_free_gpu_mem_fraction"), "from 0 to 1"),
    Mistake("policy_value", parameter("batch_scheduler_policy", "guaranteed_completion"),
            ("warning", "parameter_value", ENGINE, "batch_scheduler_policy"), "guaranteed_no_evict"),
    Mistake("groups_value", parameter("gpu_device_ids", "gpu0"),
            ("warning", "parameter_value", ENGINE, "gpu_device_ids")),
    Mistake("static_batching", parameter("gpt_model_type", "V1"),
            ("warning", "static_batching", ENGINE, "gpt_model_type"), "inflight_fused_batching"),
    Mistake("unknown_batching", parameter("gpt_model_type", "continuous"),
            ("error", "parameter_value", ENGINE, "gpt_model_type"), "inflight_fused_batching"),
    Mistake("no_batching", dropped("gpt_model_type"), ("error", "missing_parameter", ENGINE, "gpt_model_type")),
    Mistake("not_even_empty", dropped("xgrammar_tokenizer_info_path"),
            ("error", "missing_parameter", ENGINE, "xgrammar_tokenizer_info_path")),
    Mistake("empty_path", parameter("gpt_model_path", ""), ("error", "missing_parameter", ENGINE, "gpt_model_path")),
    Mistake("no_tokenizer", dropped("tokenizer_dir", "postprocessing"),
            ("error", "missing_parameter", POST, "tokenizer_dir")),
    # Tensors.
    Mistake("no_input", lambda repo: repo.models["tensorrt_llm"].inputs.pop("request_output_len"),
            ("error", "missing_tensor", ENGINE, "input.request_output_len"), "TYPE_INT32"),
    Mistake("input_type", tensor("tensorrt_llm", "input_ids", "TYPE_UINT32", "-1"),
            ("error", "tensor_type", ENGINE, "input.input_ids"), "TYPE_INT32"),
    Mistake("input_dims", tensor("tensorrt_llm", "stop_words_list", dims="-1", optional=True),
            ("error", "tensor_dims", ENGINE, "input.stop_words_list"), "2 dim(s)"),
    Mistake("input_name", tensor_renamed("input_ids", "inputs_ids"),
            ("error", "tensor_name", ENGINE, "input.inputs_ids"), "input_ids"),
    Mistake("own_input", tensor("tensorrt_llm", "suppress_token_scales", "TYPE_FP32", "-1", optional=True),
            ("warning", "tensor_name", ENGINE, "input.suppress_token_scales")),
    Mistake("old_seed", both(tensor_renamed("seed", "random_seed"), map_renamed("tensorrt_llm", "seed", "random_seed")),
            ("warning", "tensor_release", ENGINE, "input.random_seed"), "seed"),
    Mistake("new_seed", tensor_renamed("random_seed", "seed", "tensorrt_llm_bls"),
            ("warning", "tensor_release", BLS, "input.seed"), "random_seed", release="0.11.0"),
    # How the models fit together.
    Mistake("old_seed_in_map", map_renamed("tensorrt_llm", "seed", "random_seed"),
            ("error", "ensemble_map", ENSEMBLE, "tensorrt_llm.input_map.random_seed"), "rename it to seed"),
    Mistake("unmade_tensor", source("input_ids", "_INPUT_IDS"),
            ("error", "ensemble_map", ENSEMBLE, "tensorrt_llm.input_map.input_ids"), "_INPUT_ID"),
    Mistake("unmapped_input", lambda repo: repo.models["ensemble"].steps["postprocessing"][0].pop("SEQUENCE_LENGTH"),
            ("error", "ensemble_map", ENSEMBLE, "postprocessing.input_map.SEQUENCE_LENGTH")),
    Mistake("unmade_output", lambda repo: repo.models["ensemble"].steps["postprocessing"][1].pop("OUTPUT"),
            ("error", "ensemble_map", ENSEMBLE, "output.text_output")),
    Mistake("unequal_types", tensor("ensemble", "context_logits", "TYPE_FP16", "-1, -1"),
            ("error", "ensemble_type", ENSEMBLE, "output.context_logits"), "TYPE_FP32"),
    Mistake("unknown_step", lambda repo: repo.models["ensemble"].steps.update(
                {"post": repo.models["ensemble"].steps.pop("postprocessing")}),
            ("error", "ensemble_step", ENSEMBLE, "step.model_name"), "postprocessing"),
    Mistake("ensemble_batch", batch("8", "ensemble"), ("error", "ensemble_batch", ENSEMBLE, "max_batch_size"), "4"),
    Mistake("decoupled_bls", replaced("tensorrt_llm", "false", "true"),
            ("error", "decoupled", BLS, "model_transaction_policy.decoupled"), "true, as in"),
    Mistake("decoupled_ensemble", extra("ensemble", "model_transaction_policy { decoupled: true }"),
            ("error", "decoupled", ENSEMBLE, "model_transaction_policy.decoupled"), "false, as in"),
    Mistake("bls_target", parameter("tensorrt_llm_model_name", "tensorrt-llm", "tensorrt_llm_bls"),
            ("error", "bls_model", BLS, "tensorrt_llm_model_name"), "tensorrt_llm"),
    Mistake("bls_draft", parameter("tensorrt_llm_draft_model_name", "tiny", "tensorrt_llm_bls"),
            ("error", "bls_model", BLS, "tensorrt_llm_draft_model_name")),
    # Files.
    Mistake("name", directory_renamed("tensorrt_llm_bls", "bls"),
            ("error", "name", "bls/config.pbtxt", "name"), "'bls'",
            after=directory_renamed("tensorrt_llm_bls", "bls"), ),
    Mistake("backend", lambda repo: setattr(repo.models["tensorrt_llm"], "backend", 'backend: "tensorrt_llm"'),
            ("error", "backend", ENGINE, "backend"), "tensorrtllm"),
    Mistake("no_version_directory", lambda repo: repo.without.add("ensemble/1"),
            ("error", "version_directory", ENSEMBLE, "ensemble/1")),
    Mistake("no_model_py", lambda repo: repo.without.add("preprocessing/1/model.py"),
            ("error", "model_py", PRE, "preprocessing/1/model.py")),
    Mistake("syntax", extra("postprocessing", "dynamic_batching {"), ("error", "syntax", POST, "text format")),
    Mistake("unknown_field", extra("postprocessing", "max_bach_size: 4"), ("error", "syntax", POST, "text format"),
            "max_bach_size"),
    Mistake("no_tokenizer_dir", parameter("tokenizer_dir", "/nowhere/tokenizer", "preprocessing"),
            ("error", "tokenizer_path", PRE, "tokenizer_dir")),
    Mistake("removed_flag", script("trtllm-build \\\n  --checkpoint_dir x \\\n  --max_output_len 100\n"),
            ("warning", "removed_flag", "build.sh", "--max_output_len"), "max_seq_len",
            after=script("trtllm-build \\\n  --checkpoint_dir x \\\n  --max_output_len 100\n")),
    Mistake("removed_paged", script("trtllm-build --paged_kv_cache enable\n"),
            ("warning", "removed_flag", "build.sh", "--paged_kv_cache"), "kv_cache_type",
            after=script("trtllm-build --paged_kv_cache enable\n")),
    # The engine.
    Mistake("no_engine", parameter("gpt_model_path", "/engines/llama"),
            ("error", "engine_path", ENGINE, "gpt_model_path"),
            "--mount"),
    Mistake("no_config", engine_file("config.json", None), ("error", "engine_path", ENGINE, "gpt_model_path"),
            "no config.json"),
    Mistake("a_checkpoint", engine_file("config.json", '{"architecture": "x", "quantization": {}, "mapping": {}}'),
            ("error", "engine_path", ENGINE, "gpt_model_path"), "a TensorRT-LLM checkpoint"),
    Mistake("a_hub_model", engine_file("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
            ("error", "engine_path", ENGINE, "gpt_model_path"), "a Hugging Face checkpoint"),
    Mistake("damaged_config", engine_file("config.json", '{"version": '),
            ("error", "engine_path", ENGINE, "gpt_model_path"),
            "damaged"),
    Mistake("no_rank_file", engine_file("rank0.engine", None), ("error", "rank_files", ENGINE, "gpt_model_path"),
            "rank0.engine"),
    Mistake("extra_rank_file", engine_file("rank1.engine", "x"), ("error", "rank_files", ENGINE, "gpt_model_path"),
            "another build"),
    Mistake("old_engine", old_engine, ("error", "old_engine", ENGINE, "gpt_model_path"), "0.8", release="0.8.0"),
    Mistake("batch", batch("8"), ("error", "max_batch_size", ENGINE, "max_batch_size"), "engine's 4"),
    Mistake("beams", parameter("max_beam_width", "4"),
            ("error", "max_beam_width", ENGINE, "max_beam_width"), "engine's 1"),
    Mistake("chunked", no_paged_attention(parameter("enable_chunked_context", "true")),
            ("error", "chunked_context", ENGINE, "enable_chunked_context"), "--trtllm use_paged_context_fmha=enable"),
    Mistake("reuse", engine(plugins={"use_paged_context_fmha": False}),
            ("error", "kv_cache_reuse", ENGINE, "enable_kv_cache_reuse"), "--trtllm use_paged_context_fmha=enable"),
    Mistake("reuse_by_default", both(no_paged_attention(), parameter("enable_kv_cache_reuse", "")),
            ("warning", "kv_cache_reuse", ENGINE, "enable_kv_cache_reuse"), "not set"),
    Mistake("reuse_int8", engine(quantization={"kv_cache_quant_algo": "INT8"}),
            ("warning", "kv_cache_reuse", ENGINE, "enable_kv_cache_reuse"), "INT8"),
    Mistake("logits", engine(pretrained={"logits_dtype": "float16"}),
            ("error", "logits_datatype", ENGINE, "logits_datatype"), "TYPE_FP16"),
    Mistake("window", parameter("max_attention_window_size", "128,4096"),
            ("warning", "attention_window", ENGINE, "max_attention_window_size"), "256"),
    Mistake("cache_tokens", parameter("max_tokens_in_paged_kv_cache", "100"),
            ("warning", "kv_cache_tokens", ENGINE, "max_tokens_in_paged_kv_cache"), "256"),
    Mistake("continuous_cache", engine(build={"kv_cache_type": "CONTINUOUS"}),
            ("error", "inflight_batching", ENGINE, "gpt_model_type"), "paged"),
    Mistake("lora", parameter("lora_cache_max_adapter_size", "32"),
            ("warning", "lora", ENGINE, "lora_cache_max_adapter_size"), "--trtllm lora_plugin=auto"),
    Mistake("cross_cache", parameter("cross_kv_cache_fraction", "0.5"),
            ("error", "cross_kv_cache", ENGINE, "cross_kv_cache_fraction")),
    Mistake("weight_streaming", parameter("gpu_weights_percent", "0.5"),
            ("error", "weight_streaming", ENGINE, "gpu_weights_percent"), "--trtllm weight_streaming=true"),
    Mistake("medusa", parameter("decoding_mode", "medusa"), ("warning", "decoding_mode", ENGINE, "decoding_mode")),
    Mistake("lookahead", both(parameter("decoding_mode", "lookahead"), engine(build={"speculative_decoding_mode": 8})),
            ("error", "decoding_mode", ENGINE, "lookahead_window_size"), "all three"),
    Mistake("guided", parameter("guided_decoding_backend", "xgrammar"),
            ("warning", "guided_decoding", ENGINE, "guided_decoding_backend"), "xgrammar_tokenizer_info_path"),
    Mistake("device_ids", parameter("gpu_device_ids", "0,1"),
            ("error", "gpu_device_ids", ENGINE, "gpu_device_ids"), "tp 1"),
    Mistake("device_groups", parameter("gpu_device_ids", "0;1"),
            ("warning", "gpu_device_ids", ENGINE, "gpu_device_ids"),
            "count to 2"),
    Mistake("participants", parameter("participant_ids", "1,2,3"),
            ("error", "participant_ids", ENGINE, "participant_ids")),
    Mistake("world_size", lambda _: None, ("error", "world_size", ENGINE, "--world-size"), "mpirun -n 1",
            options={"world_size": 2}),
    Mistake("world_size_of_script", lambda _: None, ("error", "world_size", ENGINE, "--world-size"), "mpirun -n 1",
            after=lambda repo: (repo.root / "run.sh").write_text(
                "# --world_size 8\npython3 launch_triton_server.py \\\n  --world_size=2 --model_repo .\n")),
    Mistake("release", lambda _: None, ("error", "version", ENGINE, "config.json: version"), "1.1.0",
            options={"release": "1.1.0"}),
    Mistake("container", lambda _: None, ("error", "version", ENGINE, "config.json: version"), "trtllm-python-py3",
            options={"container": "25.12"}),
    Mistake("two_releases", second_engine,
            ("error", "versions", "draft/config.pbtxt", "config.json: version"), "1.2.1"),
    Mistake("no_version", engine(top={"version": None}), ("warning", "version", ENGINE, "config.json: version")),
]  # fmt: skip


def _facts(finding: Finding) -> tuple[str, str, str, str]:
    """Without line numbers, which move."""
    return finding.severity, finding.check, finding.file, finding.key


def test_there_are_enough_of_them() -> None:
    assert len({mistake.name for mistake in MISTAKES}) == len(MISTAKES) >= 25


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[tuple[str, str, str, str]]]:
    """What a repository without a mistake gives, by release: notes."""
    releases = {mistake.release for mistake in MISTAKES}
    repos = {release: hand_filled(tmp_path_factory.mktemp("right") / "repo", release) for release in releases}
    return {release: {_facts(finding) for finding in findings_of(repo)} for release, repo in repos.items()}


@pytest.mark.parametrize("mistake", MISTAKES, ids=[mistake.name for mistake in MISTAKES])
def test_mistake_gives_exactly_its_finding(
    mistake: Mistake, usual: dict[str, set[tuple[str, str, str, str]]], tmp_path: Path
) -> None:
    notes = usual[mistake.release]
    assert {facts[0] for facts in notes} == {"info"}
    repo = hand_filled(tmp_path / "repo", mistake.release)
    if mistake.after is None:
        mistake.change(repo)
    found = [f for f in findings_of(repo, mistake.after, **mistake.options) if _facts(f) not in notes]
    # Placeholders of optional parameters are in a renamed or second model too.
    found = [f for f in found if _facts(f) == mistake.expected or (f.severity, f.check) != ("info", "placeholder")]
    assert [_facts(finding) for finding in found] == [mistake.expected], "\n".join(map(str, found))
    assert mistake.found in f"{found[0].found} | {found[0].allowed} | {found[0].fix}"
    assert found[0].fix
    assert found[0].allowed


_FIXED_BY_A_BUILD = (
    "batch", "beams", "chunked", "reuse", "reuse_by_default", "logits", "lora", "weight_streaming", "medusa",
    "continuous_cache",
)  # fmt: skip


@pytest.mark.parametrize("name", _FIXED_BY_A_BUILD)
def test_builds_that_are_proposed_are_commands_of_ours(name: str, tmp_path: Path) -> None:
    """Each flag that a fix names is one of `trtbuild compile`, or of trtllm-build with a value that it takes."""
    [mistake] = [mistake for mistake in MISTAKES if mistake.name == name]
    repo = hand_filled(tmp_path / "repo", mistake.release)
    mistake.change(repo)
    [finding] = [f for f in findings_of(repo) if _facts(f) == mistake.expected]
    _, command = finding.fix.split("build the engine again: trtbuild compile RECIPE ")
    words = command.split()
    assert {word for word in words if word.startswith("--")} <= {"--trtllm", "--max-batch-size"}
    flags = [value for flag, value in itertools.pairwise(words) if flag == "--trtllm"]
    assert ("--max-batch-size 8" in command) == (not flags) == (name == "batch")
    given = Recipe.create(model="any", trtllm=tuple(flags)).trtllm if flags else {}
    assert not list(problems(_FACTS, given))


_FACTS = Facts(
    architecture="MixtralForCausalLM", dtype="bfloat16", quant_algo=None, kv_cache_quant_algo=None, is_moe=True,
    tp=1, pp=1, max_batch_size=4, max_input_len=255, max_seq_len=256,
)  # fmt: skip


def test_line_of_a_finding_is_where_the_mistake_is(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.models["tensorrt_llm"].parameters["kv_cache_free_gpu_mem_fraction"] = "85"
    [finding] = [f for f in findings_of(repo) if f.severity == "error"]
    lines = (repo.root / ENGINE).read_text(encoding="utf-8").splitlines()
    assert finding.line is not None
    assert '"85"' in lines[finding.line - 1]
    assert finding.place == f"{ENGINE}:{finding.line}"


def test_ranks_of_two_gpus(tmp_path: Path) -> None:
    """World size 2: two rank files, two devices, two MPI ranks are right; each other number is an error."""
    repo = hand_filled(tmp_path / "repo", layout=Layout.resolve(2))
    repo.models["tensorrt_llm"].parameters["gpu_device_ids"] = "0,1"
    assert not [f for f in findings_of(repo, world_size=2) if f.severity != "info"]
    assert [f.check for f in findings_of(repo, world_size=4) if f.severity != "info"] == ["world_size"]
    (repo.engine / "rank1.engine").unlink()
    assert [f.check for f in findings_of(repo, world_size=2) if f.severity != "info"] == ["rank_files"]
