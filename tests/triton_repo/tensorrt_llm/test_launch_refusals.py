"""Every way in which TensorRT-LLM engines' repository, options and machines disagree is refused before a start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_ranks import make_repository
from launch_plans import TP2, TP4, TWO, hostfile, refused, serve

from trtbuild.containers import Installed
from trtbuild.errors import CheckpointError, Refused
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.tensorrt_llm import preflight
from trtbuild.triton_repo.tensorrt_llm.hostfile import read_hostfile
from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions, LaunchPlan
from trtbuild.triton_repo.tensorrt_llm.served_models import has_trtllm_models, read_trtllm_models


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a slots=2", "b slots=1"], "3 slots on 2 hosts, for 4 ranks"),
        (["a slots=1", "b slots=3"], "a: 1 rank, but the engine is for 2 GPUs a node"),
        (["a slots=4"], "a: 4 ranks, but the engine is for 2 GPUs a node"),
        (["a slots=2", "b"], "line 2: 'b'"),
        (["a slots=two"], "line 1: 'a slots=two'"),
        (["a slots=0"], "line 1: 'a slots=0'"),
        (["a slots = 2 b slots = 2"], "line 1: "),
        (["# nobody"], "no host in it"),
    ],
)
def test_hostfiles_that_do_not_fit(lines: list[str], words: str, tmp_path: Path) -> None:
    mapping = {"world_size": 4, "tp_size": 4, "pp_size": 1, "gpus_per_node": 2}
    models = {"tensorrt_llm": {"layout": TP4, "pretrained": {"mapping": mapping}}}
    assert words in refused(tmp_path, models, hostfile(tmp_path, *lines))


ORCHESTRATOR = LaunchOptions(multi_model=True, spawn=False)
REFUSALS: dict[str, tuple[dict[str, dict[str, Any]], LaunchOptions, str]] = {
    "GPUs of another world size": (
        {"m": {"layout": TP2, "parameters": {"gpu_device_ids": "0,1,2,3"}}}, LaunchOptions(),
        "m: gpu_device_ids 0,1,2,3 has 4 entries; the engine has 2 ranks (tp 2 x pp 1)",
    ),
    "a GPU twice": (
        {"m": {"layout": TP2, "parameters": {"gpu_device_ids": "1,1"}}}, LaunchOptions(),
        "gpu_device_ids 1,1 has one twice",
    ),
    "GPUs that are no numbers": (
        {"m": {"parameters": {"gpu_device_ids": "0 1"}}}, LaunchOptions(), "gpu_device_ids is '0 1'",
    ),
    "groups and instances": (
        {"m": {"layout": TP2, "parameters": {"gpu_device_ids": "0,1;2,3"}, "count": 3}},
        LaunchOptions(multi_model=True), "m: 2 groups in gpu_device_ids, but 3 instances",
    ),
    "instances need an orchestrator": (
        {"m": {"layout": TP2, "count": 2}}, LaunchOptions(), "m: 2 instances of 2 ranks need --multi-model",
    ),
    "several engines": (
        {"a": {"layout": TP2}, "b": {}}, LaunchOptions(),
        "a (2 ranks), b (1 rank): add --multi-model, or name the one",
    ),
    "participants missing": (
        {"a": {"parameters": {"participant_ids": "1"}}, "m": {"layout": TP2, "count": 2}}, ORCHESTRATOR,
        "m: no participant_ids, which --disable-spawn-processes needs; rank 0 is the orchestrator's: trtbuild package "
        "... --trtllm 'participant_ids=2,3;4,5'",
    ),
    "several releases": (
        {"a": {"version": "1.1.0"}, "b": {"version": "1.2.1"}}, LaunchOptions(multi_model=True),
        "engines of several releases, a (1.1.0), b (1.2.1): a server has one TensorRT-LLM",
    ),
    "rank 0 is taken": (
        {"m": {"layout": TP2, "parameters": {"participant_ids": "0,1"}}}, ORCHESTRATOR,
        "must be 1 to 2, each rank once, since 0 is the orchestrator; they are m 0,1",
    ),
    "participants twice": (
        {"a": {"parameters": {"participant_ids": "1"}}, "b": {"parameters": {"participant_ids": "1"}}}, ORCHESTRATOR,
        "they are a 1; b 1",
    ),
    "participants of another world size": (
        {"m": {"layout": TP2, "parameters": {"participant_ids": "1"}}}, ORCHESTRATOR, "participant_ids 1 has 1 entries",
    ),
    "spawning nobody": ({"m": {}}, LaunchOptions(spawn=False), "--disable-spawn-processes goes with --multi-model"),
    "spawning in Slurm": (
        {"m": {}}, LaunchOptions("srun", multi_model=True), "not for Slurm; add --disable-spawn-processes",
    ),
    "a placeholder": (
        {"m": {"parameters": {"gpt_model_path": "${engine_dir}"}}}, LaunchOptions(),
        "still the placeholder ${engine_dir}",
    ),
    "no engine": (
        {"m": {"parameters": {"gpt_model_path": "/no/such/engine"}}}, LaunchOptions(),
        "gpt_model_path is /no/such/engine, and there is no engine",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_contradictions_are_refused(case: str, tmp_path: Path) -> None:
    models, options, words = REFUSALS[case]
    assert words in refused(tmp_path, models, options)


def test_hostfiles_are_refused_where_nobody_reads_them(tmp_path: Path) -> None:
    options = hostfile(tmp_path, "a slots=2")
    assert "the engine has one rank" in refused(tmp_path / "1", {"m": {}}, options)
    with_srun = LaunchOptions("srun", options.hostfile)
    assert "--hostfile is mpirun's" in refused(tmp_path / "2", {"m": TWO}, with_srun)
    spawning = LaunchOptions(hostfile=options.hostfile, multi_model=True)
    assert "spawns ranks on this node only" in refused(tmp_path / "3", {"m": TWO}, spawning)


def test_a_damaged_engine_is_named(tmp_path: Path) -> None:
    repository = make_repository(tmp_path / "a", {"m": {"layout": TP4}})
    (tmp_path / "a/engines/m/rank2.engine").unlink()
    with pytest.raises(CheckpointError, match=r"rank2\.engine of 4 ranks missing"):
        read_trtllm_models(repository, ["m"])
    mapping = {"world_size": 4, "tp_size": 2, "pp_size": 1}
    repository = make_repository(tmp_path / "b", {"m": {"layout": TP4, "pretrained": {"mapping": mapping}}})
    with pytest.raises(CheckpointError, match="world_size 4, but tp 2 x pp 1 x cp 1"):
        read_trtllm_models(repository, ["m"])


def test_a_config_that_triton_cannot_parse(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    file = repository / "tensorrt_llm" / "config.pbtxt"
    file.write_text(file.read_text().replace("max_batch_size: 4", "max_batch_size: ${triton_max_batch_size}"))
    assert has_trtllm_models(repository)
    with pytest.raises(Refused, match=r"Triton cannot parse it .*trtbuild migrate"):
        read_trtllm_models(repository, ["tensorrt_llm"])


def test_an_engine_of_another_release_is_refused(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, {"m": {"version": "1.1.0"}})
    models = read_trtllm_models(repository, ["m"])
    found = LaunchPlan((), (("tritonserver",),))
    with pytest.raises(Refused) as message:
        preflight.check_here(found, models, Installed("1.2.1"))
    assert "m: the engine was built by TensorRT-LLM 1.1.0, and this is 1.2.1" in message.value.message
    assert "26.02-trtllm-python-py3" in message.value.message
    assert "trtbuild compile tiny-mixtral --builder tensorrt-llm --name m --force" in message.value.message
    preflight.check_here(found, models, Installed("1.1.0"))


def test_launchers_and_hosts_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refused, match="mpirun is not on PATH"):
        preflight.check_here(LaunchPlan(("mpirun",), ()), (), Installed(None))
    monkeypatch.setattr(preflight.shutil, "which", lambda name: name)
    for node in ("", "1"):
        monkeypatch.setenv("SLURM_NODEID", node)
        with pytest.raises(Refused, match="works on the first node of a Slurm allocation"):
            preflight.check_here(LaunchPlan(("srun",), ()), (), Installed(None))
    monkeypatch.setenv("SLURM_NODEID", "0")
    preflight.check_here(LaunchPlan(("srun",), ()), (), Installed(None))
    options = hostfile(tmp_path, "elsewhere.invalid slots=8", "localhost slots=8")
    assert options.hostfile is not None
    found = LaunchPlan((), (), hosts=read_hostfile(options.hostfile))
    with pytest.raises(Refused, match=r"first host is elsewhere\.invalid, where rank 0 will listen"):
        preflight.check_here(found, (), Installed(None))


def test_only_a_triton_with_the_backend_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = read_trtllm_models(make_repository(tmp_path), ["tensorrt_llm"])
    binary = tmp_path / "triton" / "bin" / "tritonserver"
    for installation, words in (
        (
            TritonInstallation(binary, "nvidia-pytriton 0.7.0", backends=tmp_path),
            "nvidia-pytriton 0.7.0's Triton cannot run",
        ),
        (TritonInstallation(binary, "PATH"), "has no backend 'tensorrtllm'"),
    ):
        (tmp_path / "triton" / "backends").mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(preflight, "find_triton", lambda given, found=installation: found)
        with pytest.raises(Refused, match=re.escape(words)) as refusal:
            preflight.find_server(None, models, dry_run=False)
        assert "26.07-trtllm-python-py3; --dry-run prints the command" in refusal.value.message
    (tmp_path / "triton" / "backends" / "tensorrtllm").mkdir()
    assert preflight.find_server(None, models, dry_run=False).binary == binary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--openai-port", "9000"], "--openai-port speaks to trtbuild's own models only"),
        (["--model-control-mode", "poll"], "--model-control-mode poll"),
        (["nobody"], "nobody: not in"),
        (["preprocessing"], "are for TensorRT-LLM engines"),
    ],
)
def test_what_serve_refuses(arguments: list[str], words: str, tmp_path: Path) -> None:
    found = serve(make_repository(tmp_path), "--dry-run", *arguments)
    assert found.exit_code == 3
    assert words in found.output


@pytest.mark.parametrize("option", [["--launcher", "mpirun"], ["--multi-model"], ["--launcher-arg", "-v"]])
def test_options_of_ranks_are_refused_elsewhere(option: list[str], tmp_path: Path) -> None:
    found = serve(make_repository(tmp_path, {}), *option)
    assert found.exit_code == 3
    assert "are for TensorRT-LLM engines" in found.output
