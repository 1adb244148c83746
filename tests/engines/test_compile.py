"""The road end to end on the bundled models: compile, passport, load, generate."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import TINY_MIXTRAL, TINY_QWEN2, make_checkpoint

from trtbuild.cli import main
from trtbuild.engines.compile import CompileReport, compile_engine
from trtbuild.engines.device import choice, engine_ranks
from trtbuild.engines.device.engine_ranks import WarmReport
from trtbuild.engines.job import Job
from trtbuild.engines.load import load_engine
from trtbuild.engines.passport import Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import CheckpointError, EngineBuildError, Refused
from trtbuild.workspace import Workspace

SMALL = {"target": ("sm89",), "max_batch_size": 2, "max_seq_len": 128, "chunk_size": 64}


def compile_small(workspace: Path, model: str, **fields: object) -> CompileReport:
    return compile_engine(Job.resolve(Recipe.create(model=model, **SMALL, **fields)), Workspace(workspace), workers=1)


@pytest.fixture(scope="module")
def mixtral_fp8(tmp_path_factory: pytest.TempPathFactory) -> CompileReport:
    return compile_small(tmp_path_factory.mktemp("fp8"), "tiny-mixtral", precision="fp8", tp=2, moe_ep=2)


def test_passport_says_what_was_asked_and_found(mixtral_fp8: CompileReport) -> None:
    passport = mixtral_fp8.passport
    assert mixtral_fp8.directory.name == passport["name"] == "tiny-mixtral-fp8-tp2-ep2"
    assert passport["layout"] == {"tp": 2, "pp": 1, "moe_tp": 1, "moe_ep": 2}
    assert passport["targets"] == ["sm89"]
    assert passport["rebuild"].startswith("trtbuild compile tiny-mixtral --precision fp8 --tp 2 --moe-ep 2")
    phases = {plan["phase"]: plan for plan in passport["plans"] if plan["kind"] == "decoder"}
    assert {phase: plan["moe_form"] for phase, plan in phases.items()} == {
        "prefill": "conditional", "decode": "conditional",
    }  # fmt: skip
    for plan in phases.values():
        # 3 layers: qkv and dense, and 4 of the 8 experts on each rank with two GEMMs each.
        assert plan["verification"]["gemms"][0]["fp8_e4m3 x fp8_e4m3"] == 3 * (2 + 4 * 2)
        assert plan["verification"]["world_size"] == 2
        assert [served["rank"] for served in plan["serves"]] == [0, 1]
    fc = passport["tensors"]["transformer.layers.1.mlp.fc"]
    assert fc["precision"] == "fp8"
    assert 0.01 < fc["relative_error"] < 0.04
    assert len(fc["calibration_tokens_per_expert"]) == 8
    assert min(fc["calibration_tokens_per_expert"]) > 100


def test_weights_are_hard_links_of_the_rank_checkpoint(mixtral_fp8: CompileReport) -> None:
    build = mixtral_fp8.directory.parents[1] / "build" / mixtral_fp8.directory.name
    for rank in range(2):
        name = f"rank{rank}.safetensors"
        assert (mixtral_fp8.directory / name).samefile(build / name)


def test_the_same_request_builds_nothing(mixtral_fp8: CompileReport) -> None:
    before = {file: file.stat().st_mtime_ns for file in mixtral_fp8.directory.rglob("*")}
    assert mixtral_fp8.built
    again = compile_small(mixtral_fp8.directory.parents[1], "tiny-mixtral", precision="fp8", tp=2, moe_ep=2)
    assert {file: file.stat().st_mtime_ns for file in mixtral_fp8.directory.rglob("*")} == before
    assert again.passport == mixtral_fp8.passport
    assert not again.built
    with pytest.raises(Refused, match=r"targets: \['sm89'\] -> \['sm89', 'sm120', 'sm121'\]"):
        fields = {**SMALL, "target": (), "precision": "fp8", "tp": 2, "moe_ep": 2}
        job = Job.resolve(Recipe.create(model="tiny-mixtral", **fields))
        compile_engine(job, Workspace(mixtral_fp8.directory.parents[1]), workers=1)


def test_generate_streams_and_names_the_executor(mixtral_fp8: CompileReport) -> None:
    workspace = ["--workspace", str(mixtral_fp8.directory.parents[1])]
    command = ["generate", mixtral_fp8.directory.name, "ROMEO", "--max-tokens", "12", *workspace]
    plain = CliRunner().invoke(main, command)
    assert plain.exit_code == 0, plain.output
    assert re.search(r"reference executor \(PyTorch on cpu, not TensorRT: .+\): 12 tokens", plain.stderr)
    found = json.loads(CliRunner().invoke(main, [*command, "--json", "--logprobs", "1"]).stdout)
    assert found["text"] + "\n" == plain.stdout
    assert (found["executor"], found["finish_reason"], len(found["token_ids"])) == ("reference", "length", 12)
    # Greedy: the chosen token is the likeliest.
    assert [top[0][0] for top in found["top_logprobs"]] == found["token_ids"]


def test_a_damaged_engine_is_named_with_the_way_back(mixtral_fp8: CompileReport, tmp_path: Path) -> None:
    copy = tmp_path / "engine"
    subprocess.run(["cp", "-r", str(mixtral_fp8.directory), str(copy)], check=True)
    load_engine(copy, num_slots=1).executor.close()
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"tokenizer/tokenizer.json differs.*trtbuild compile tiny-mixtral"):
        load_engine(copy, num_slots=1)
    (copy / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1.safetensors is missing"):
        load_engine(copy, num_slots=1)
    passport = json.loads((copy / "engine.json").read_text())
    (copy / "engine.json").write_text(json.dumps(passport | {"format": 99}))
    with pytest.raises(Refused, match=r"format 99, this trtbuild reads 2; rebuild: trtbuild compile"):
        Passport.open(copy)


def test_changed_tokenizer_and_lost_files_are_noticed(tmp_path: Path) -> None:
    """An engine that is there is not called done because its request once was."""
    model = tmp_path / "model"
    subprocess.run(["cp", "-r", str(TINY_QWEN2), str(model)], check=True)
    report = compile_small(tmp_path, str(model))
    (report.directory / "rank0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank0.safetensors is missing; rebuild: trtbuild compile .* --force"):
        compile_small(tmp_path, str(model))
    generation = model / "generation_config.json"
    generation.write_text(generation.read_text().replace("2", "3"))
    with pytest.raises(Refused, match="tokenizer: "):
        compile_small(tmp_path, str(model))


def test_int4_is_embedded_per_rank_and_packed(tmp_path: Path) -> None:
    report = compile_small(tmp_path, "tiny-qwen2", precision="int4", tp=2)
    decoders = [plan for plan in report.passport["plans"] if plan["kind"] == "decoder"]
    assert [plan["serves"] for plan in decoders] == [[{"rank": rank, "segment": 1}] for rank in range(2)]
    stored = sum((report.directory / f"rank{rank}.safetensors").stat().st_size for rank in range(2))
    assert sum(plan["weight_bytes"] for plan in decoders) < stored


def test_plan_only_needs_no_weights_and_cannot_run(tmp_path: Path) -> None:
    config_only = tmp_path / "model"
    config_only.mkdir()
    (config_only / "config.json").write_bytes((TINY_MIXTRAL / "config.json").read_bytes())
    report = compile_small(tmp_path, str(config_only), precision="fp8", tp=2, plan_only=True)
    assert not (tmp_path / "build").exists()
    assert not report.passport["digests"]["weights"]
    with pytest.raises(Refused, match=r"--plan-only and has no weights; to run it: (?!.*--plan-only).* --force"):
        load_engine(report.directory)


def test_killed_while_compiling_it_goes_on(tmp_path: Path) -> None:
    """After SIGKILL with one plan finished, the second run keeps it and publishes the engine."""
    flags = ["--target", "sm89", "--max-seq-len", "128", "--chunk-size", "64", "--workers", "1", "--precision", "int4"]
    command = [sys.executable, "-m", "trtbuild", "compile", str(TINY_QWEN2), "--tp", "2", "--name", "x", *flags]
    plans = tmp_path / "engines" / ".x.partial" / "plans"
    process = subprocess.Popen(
        [*command, "--workspace", str(tmp_path)], start_new_session=True, stderr=subprocess.DEVNULL
    )
    while not list(plans.glob("*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {record: record.stat().st_mtime_ns for record in plans.glob("*.json")}
    assert not (tmp_path / "engines" / "x").exists()
    result = CliRunner().invoke(main, [*command[3:], "--workspace", str(tmp_path)])
    assert result.exit_code == 0, result.output
    final = tmp_path / "engines" / "x" / "plans"
    assert {record.name: (final / record.name).stat().st_mtime_ns for record in kept} == {
        record.name: modified for record, modified in kept.items()
    }
    load_engine(final.parent, num_slots=1).executor.close()


@pytest.mark.parametrize("works", [True, False])
def test_a_machine_that_can_run_the_engine_compiles_its_kernels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """A GPU that fails does not undo the engine, and the failure is told."""

    def warm(directory: Path) -> WarmReport:
        assert (directory / "engine.json").is_file()
        if not works:
            raise EngineBuildError("no kernel image is available")
        return WarmReport(1.5, 3 * 2**20, False)

    monkeypatch.setattr(choice, "choose_executor", lambda *_: choice.Choice("tensorrt", "a test says so"))
    monkeypatch.setattr(engine_ranks, "warm", warm)
    report = compile_small(tmp_path, "tiny-qwen2")
    assert report.built
    outcomes = {
        True: "compiled for this machine's GPU in 1.5 s, 3.0 MiB",
        False: "not compiled for this machine's GPU: no kernel image is available",
    }
    assert report.kernels == outcomes[works]


def test_licence_and_model_card_travel_with_the_engine(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", "llama", num_hidden_layers=1)
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: mnpl\n---\nA model.\n")
    (source / "LICENSE.txt").write_text("terms")
    report = compile_small(tmp_path, str(source), name="x", plan_only=True)
    assert report.passport["source"]["license"] == "mnpl"
    assert (report.directory / "model_card" / "LICENSE.txt").read_text() == "terms"
    (report.directory / "model_card" / "LICENSE.txt").write_text("none")
    with pytest.raises(CheckpointError, match=r"model_card/LICENSE\.txt differs"):
        Passport.open(report.directory).check_files()
