"""The recipe that is written is read back by `Recipe.read`, and asks for what the engine is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hand_filled_repository import RELEASES, HandFilled, hand_filled
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.known_models import facts_directory
from trtbuild.checkpoints.layout import Layout
from trtbuild.engines.passport import Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.engines.tensorrt_llm.flags import FLAGS, Facts, derive, problems
from trtbuild.migrate.migrate import EngineMigration, migrate_repository
from trtbuild.triton_repo.tensorrt_llm.compatibility import check_options
from trtbuild.triton_repo.tensorrt_llm.option_texts import read_options
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions


def migrated(repo: HandFilled) -> EngineMigration:
    [engine] = migrate_repository(repo.write()).engines
    return engine


def read_back(engine: EngineMigration, directory: Path) -> Recipe:
    file = directory / "recipe.toml"
    file.write_text(engine.toml, encoding="utf-8")
    return Recipe.read(file)


def facts_of(recipe: Recipe) -> Facts:
    return Facts(
        architecture="MixtralForCausalLM", dtype="bfloat16", quant_algo=None, kv_cache_quant_algo=None, is_moe=True,
        tp=recipe.tp, pp=recipe.pp,
        max_batch_size=recipe.max_batch_size, max_input_len=recipe.max_input_len or 1,
        max_seq_len=recipe.max_seq_len or 2,
    )  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("layout", [(1, 1, 1, 1), (2, 1, 2, 1), (4, 1, 2, 2), (2, 2, 1, 2)])
def test_recipe_has_the_layout_and_the_limits(release: str, layout: tuple[int, int, int, int], tmp_path: Path) -> None:
    asked = Layout(*layout)
    recipe = read_back(migrated(hand_filled(tmp_path / "repo", release, asked)), tmp_path)
    assert recipe.layout == asked
    assert recipe.builder == "tensorrt-llm"
    assert recipe.precision == "bf16"
    assert recipe.model == "tiny-mixtral"
    # 0.8 says prompt and answer apart: 156 and 100.
    limits = (4, 156, 256) if release == "0.8.0" else (4, 255, 256)
    assert (recipe.max_batch_size, recipe.max_input_len, recipe.max_seq_len) == limits
    assert recipe.trtllm["max_num_tokens"] == 512
    assert not list(problems(facts_of(recipe), recipe.trtllm))


@pytest.mark.parametrize(
    ("quant_algo", "precision"),
    [
        ("FP8", "fp8"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8-dynamic"), ("W8A16", "int8"), ("W4A16", "int4"),
        ("W4A16_AWQ", "int4-awq"), ("W4A16_GPTQ", "int4-gptq"), ("NO_QUANT", "bf16"), ("W4A8_AWQ", None),
        ("NVFP4", None),
        ("W8A8_SQ_PER_CHANNEL", None), ("MIXED_PRECISION", None),
    ],
)  # fmt: skip
def test_precision_is_the_engines_algorithm(quant_algo: str, precision: str | None, tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(quantization={"quant_algo": quant_algo, "kv_cache_quant_algo": "FP8"})
    engine = migrated(repo)
    recipe = read_back(engine, tmp_path)
    assert recipe.precision == precision
    assert recipe.kv_cache == "fp8"
    assert any(quant_algo in note for note in engine.recipe.notes) == (precision is None)


def test_int8_cache_is_said_and_not_written(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(quantization={"kv_cache_quant_algo": "INT8"})
    engine = migrated(repo)
    assert read_back(engine, tmp_path).kv_cache == "auto"
    assert any("INT8" in note for note in engine.recipe.notes)


def test_flags_are_those_that_the_build_would_not_choose(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    lora = {"lora_target_modules": ["attn_q", "attn_v"], "max_lora_rank": 16, "lora_ckpt_source": "hf"}
    repo.edit_engine(
        plugins={
            "tokens_per_block": 64, "use_paged_context_fmha": False, "gemm_plugin": "bfloat16",
            "lora_plugin": "bfloat16",
            "multiple_profiles": True, "gpt_attention_plugin": "bfloat16", "use_fused_mlp": False,
        },
        build={"max_beam_width": 4, "gather_generation_logits": True, "use_strip_plan": True, "lora_config": lora},
        pretrained={"logits_dtype": "float16"},
    )  # fmt: skip
    repo.models["tensorrt_llm"].parameters["enable_kv_cache_reuse"] = "false"
    recipe = read_back(migrated(repo), tmp_path)
    assert recipe.trtllm == {
        "max_num_tokens": 512, "max_beam_width": 4, "strip_plan": True, "logits_dtype": "float16",
        "gather_generation_logits": True, "lora_target_modules": "attn_q attn_v", "max_lora_rank": 16,
        "lora_plugin": "bfloat16", "use_paged_context_fmha": "disable", "use_fused_mlp": "disable",
        "tokens_per_block": 64,
    }  # fmt: skip


_PLUGIN = st.fixed_dictionaries(
    {},
    optional={
        name: st.booleans() if flag.kind == "feature" else st.sampled_from([None, *flag.choices[:-1]])
        for name, flag in FLAGS.items()
        if flag.kind in ("feature", "plugin")
    },
)
_LAYOUTS = [Layout(1, 1, 1, 1), Layout(2, 1, 1, 2), Layout(4, 2, 2, 2)]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Layout, HandFilled]]:
    return [(layout, hand_filled(tmp_path_factory.mktemp("any") / "repo", layout=layout)) for layout in _LAYOUTS]


@settings(
    max_examples=60,
    deadline=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    plugins=_PLUGIN,
    tokens_per_block=st.sampled_from([16, 32, 64, 128]),
    limits=st.tuples(st.integers(1, 4096), st.integers(1, 10**6), st.integers(128, 10**6), st.integers(1, 10**6)),
    which=st.integers(0, len(_LAYOUTS) - 1),
)
def test_any_engine_gives_a_recipe_that_the_builder_accepts(
    places: list[tuple[Layout, HandFilled]],
    plugins: dict[str, Any],
    tokens_per_block: int,
    limits: tuple[int, int, int, int],
    which: int,
) -> None:
    layout, repo = places[which]
    before = (repo.engine / "config.json").read_bytes()
    try:
        names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
        repo.edit_engine(
            plugins=plugins | {"tokens_per_block": tokens_per_block}, build=dict(zip(names, limits, strict=True))
        )
        recipe = read_back(migrated(repo), repo.engine)
    finally:
        (repo.engine / "config.json").write_bytes(before)
    assert recipe.layout == layout
    assert (recipe.max_batch_size, recipe.max_input_len, recipe.max_seq_len) == limits[:3]
    facts = facts_of(recipe)
    assert not list(problems(facts, recipe.trtllm))
    assert derive(facts, recipe.trtllm)["tokens_per_block"] == tokens_per_block


def test_known_model_is_a_guess_by_its_sizes(tmp_path: Path) -> None:
    directory = facts_directory("llama-3.1-8b")
    assert directory is not None
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    sizes = {name: config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")}
    sizes |= {name: config[name] for name in ("num_key_value_heads", "intermediate_size")}
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(pretrained={**sizes, "moe": None})
    engine = migrated(repo)
    assert engine.recipe.fields["model"] == "llama-3.1-8b"
    line = next(line for line in engine.toml.splitlines() if line.startswith("model ="))
    assert "GUESS, confirm it" in line
    repo.edit_engine(pretrained={"hidden_size": 4097})
    assert migrated(repo).recipe.fields["model"] == str(repo.engine / "tokenizer")


def test_package_options_are_the_repositorys_settings(tmp_path: Path) -> None:
    """As `trtbuild package --trtllm` reads them; what is its default anyway is left out."""
    repo = hand_filled(tmp_path / "repo")
    parameters = repo.models["tensorrt_llm"].parameters
    parameters |= {"max_attention_window_size": "128, 256", "kv_cache_host_memory_bytes": "1000000000"}
    parameters |= {"iter_stats_max_iterations": "10", "lookahead_window_size": "4", "lookahead_ngram_size": "3"}
    parameters |= {"lookahead_verification_set_size": "2", "gpu_device_ids": "0;1", "multi_block_mode": "0"}
    parameters["maxTokensInPagedKvCache"] = "4096"
    del parameters["max_tokens_in_paged_kv_cache"]
    extra = repo.models["tensorrt_llm"].extra
    repo.models["tensorrt_llm"].extra = [line.replace("count: 1", "count: 2") for line in extra]
    engine = migrated(repo)
    assert read_options([f"{name}={value}" for name, value in engine.options.values.items()]) == TrtllmOptions(
        batch_scheduler_policy="max_utilization", kv_cache_free_gpu_mem_fraction=0.85,
        max_tokens_in_paged_kv_cache=4096,
        max_attention_window_size=(128, 256), kv_cache_host_memory_bytes=1_000_000_000, enable_kv_cache_reuse=True,
        exclude_input_in_output=True, decoding_mode="top_k_top_p", max_beam_width=1, multi_block_mode=False,
        lookahead=(4, 3, 2), max_queue_delay_microseconds=100, decoupled=False, preprocessing_instances=2,
        gpu_device_ids=((0,), (1,)), instances=2,
    )  # fmt: skip
    assert "normalize_log_probs" not in engine.options.values
    assert any("iter_stats_max_iterations" in note for note in engine.options.notes)
    assert "#     --trtllm kv_cache_free_gpu_mem_fraction=0.85" in engine.toml


_LOOKAHEAD = {"lookahead_window_size": "4", "lookahead_ngram_size": "3", "lookahead_verification_set_size": "2"}


@pytest.mark.parametrize(
    ("parameters", "left_out"),
    [
        ({"max_beam_width": "4", "decoding_mode": "beam_search"}, {"max_beam_width", "decoding_mode"}),
        ({"decoding_mode": "lookahead", **_LOOKAHEAD}, {"decoding_mode", "lookahead"}),
        ({"gpu_device_ids": "0,1;2,3"}, {"gpu_device_ids", "instances"}),
        ({"lora_cache_max_adapter_size": "32", "lora_cache_optimal_adapter_size": "16"},
         {"lora_cache_max_adapter_size", "lora_cache_optimal_adapter_size"}),
        ({"gpu_weights_percent": "0.5", "max_attention_window_size": "512", "max_tokens_in_paged_kv_cache": "64"},
         {"gpu_weights_percent", "max_attention_window_size", "max_tokens_in_paged_kv_cache"}),
        ({"enable_chunked_context": "true"}, {"enable_chunked_context", "enable_kv_cache_reuse"}),
    ],
)  # fmt: skip
def test_package_takes_the_settings_that_are_left(
    parameters: dict[str, str], left_out: set[str], tmp_path: Path
) -> None:
    """A setting that the engine does not take is a comment of the recipe, and no option of package."""
    repo = hand_filled(tmp_path / "repo")
    repo.models["tensorrt_llm"].parameters |= parameters
    if "enable_chunked_context" in parameters:
        repo.edit_engine(plugins={"use_paged_context_fmha": False})
    engine = migrated(repo)
    options = read_options([f"{name}={value}" for name, value in engine.options.values.items()])
    check_options(options, Passport.open(repo.engine), TrtllmEngine.open(repo.engine))
    assert not left_out & set(engine.options.values)
    assert engine.options.values["kv_cache_free_gpu_mem_fraction"] == "0.85"
    for name in left_out:
        comments = [line for line in engine.toml.splitlines() if line.startswith("# left out") and f"{name} = " in line]
        assert len(comments) == 1, engine.toml


def test_model_of_our_own_engine_is_no_guess(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    passport = json.loads((repo.engine / "engine.json").read_text(encoding="utf-8"))
    passport["source"] |= {"model": "acme/mix-1", "revision": "abc"}
    (repo.engine / "engine.json").write_text(json.dumps(passport), encoding="utf-8")
    engine = migrated(repo)
    recipe = read_back(engine, tmp_path)
    assert (recipe.model, recipe.revision) == ("acme/mix-1", "abc")
    assert "GUESS" not in engine.toml
    # The passport of another engine says nothing of this one.
    repo.edit_engine(build={"max_batch_size": 5})
    other = migrated(repo)
    assert other.recipe.fields["model"] == "tiny-mixtral"
    assert "GUESS, confirm it" in other.toml


@pytest.mark.parametrize(
    "passport", ["", "[]", '{"source": "x"}', '{"source": {"model": 5}, "digests": {"engines": 1}}']
)
def test_damaged_passport_is_no_obstacle(passport: str, tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    (repo.engine / "engine.json").write_text(passport, encoding="utf-8")
    assert "GUESS, confirm it" in migrated(repo).toml


def test_strange_names_are_quoted(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(pretrained={"hidden_size": 1})
    strange = tmp_path / 'a "b"\u007f\u2028 c'
    (repo.engine / "tokenizer").rename(strange)
    for name in ("preprocessing", "postprocessing"):
        repo.models[name].parameters["tokenizer_dir"] = str(strange).replace('"', '\\"')
    assert read_back(migrated(repo), tmp_path).model == str(strange).replace("\u007f", "?")
