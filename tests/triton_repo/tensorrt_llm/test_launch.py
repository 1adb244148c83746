"""The command that serves TensorRT-LLM engines, and every way in which repository, options and machines disagree."""

from __future__ import annotations

import itertools
import re
import shlex
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_ranks import make_repository
from trtllm_engine import make_trtllm_engine

from trtbuild.checkpoints.layout import Layout
from trtbuild.cli import main
from trtbuild.containers import Installed
from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import CheckpointError, Refused
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.tensorrt_llm import preflight
from trtbuild.triton_repo.tensorrt_llm.hostfile import is_this_machine, read_hostfile
from trtbuild.triton_repo.tensorrt_llm.launch import (
    LaunchOptions,
    LaunchPlan,
    ServerOptions,
    launch_warnings,
    plan_launch,
)
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import write_repository
from trtbuild.triton_repo.tensorrt_llm.served_models import has_trtllm_models, read_trtllm_models
from trtbuild.triton_repo.triton_process import Ports

TP2, TP4, TP2_PP2 = Layout(tp=2, moe_tp=2), Layout(tp=4, moe_tp=4), Layout(tp=2, pp=2, moe_tp=2)
TWO = {"layout": TP2}


def plan(
    folder: Path,
    models: dict[str, dict[str, Any]] | None = None,
    options: LaunchOptions | None = None,
    environment: dict[str, str] | None = None,
    **server: Any,
) -> LaunchPlan:
    repository = make_repository(folder, models)
    found = read_trtllm_models(repository, ["preprocessing", *(models or {"tensorrt_llm": {}})])
    where = ServerOptions(repository, Path("tritonserver"), **server)
    return plan_launch(found, where, options or LaunchOptions(), environment=environment or {})


def hostfile(folder: Path, *lines: str) -> LaunchOptions:
    file = folder / "hosts"
    file.write_text("\n".join(lines))
    return LaunchOptions(hostfile=file)


def values(rank: tuple[str, ...], name: str) -> list[str]:
    return [part.partition("=")[2] for part in rank if part.startswith(f"--{name}=")]


def refused(folder: Path, models: dict[str, dict[str, Any]] | None, options: LaunchOptions | None = None) -> str:
    with pytest.raises(Refused) as found:
        plan(folder, models, options)
    return found.value.message


def test_a_process_for_each_rank(tmp_path: Path) -> None:
    found = plan(tmp_path, {"tensorrt_llm": {"layout": TP4}}, arguments=("--log-verbose=1",))
    assert found.launcher == ("mpirun", "--allow-run-as-root", "--bind-to", "none")
    assert found.environment == {}
    assert len(found.ranks) == 4
    for number, rank in enumerate(found.ranks):
        assert rank[0] == "tritonserver"
        assert values(rank, "model-repository") == [str(tmp_path / "models")]
        assert values(rank, "backend-config") == [f"python,shm-region-prefix-name=prefix{number}_"]
        assert "--disable-auto-complete-config" in rank
        assert "--log-verbose=1" in rank
        # The engine alone on ranks that only compute.
        assert values(rank, "load-model") == (["tensorrt_llm"] if number else [])
        assert values(rank, "model-control-mode") == (["explicit"] if number else [])


def test_ports_are_the_users_on_rank_0_and_nobody_elses(tmp_path: Path) -> None:
    ports = Ports(http=9100, grpc=9000, metrics=9050, host="0.0.0.0")
    found = plan(tmp_path, {"tensorrt_llm": {"layout": TP4}}, ports=ports)
    first = found.ranks[0]
    assert [values(first, f"{name}-port") for name in ("http", "grpc", "metrics")] == [["9100"], ["9000"], ["9050"]]
    assert values(first, "http-address") == values(first, "metrics-address") == ["0.0.0.0"]
    taken = [
        int(port)
        for rank in found.ranks
        for name in ("http", "grpc", "metrics")
        for port in values(rank, f"{name}-port")
    ]
    assert len(set(taken)) == len(taken) == 12
    assert {address for rank in found.ranks[1:] for address in values(rank, "http-address")} == {"127.0.0.1"}
    with pytest.raises(Refused, match="no ports above 65535 for rank 1"):
        plan(tmp_path / "high", {"tensorrt_llm": TWO}, ports=Ports(http=65535))


def test_one_rank_needs_no_mpi(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert found.launcher == ()
    assert found.command() == list(found.ranks[0])
    assert "prefix0_" in found.text() and "mpirun" not in found.text()


def test_named_models_are_loaded_explicitly(tmp_path: Path) -> None:
    found = plan(tmp_path, {"tensorrt_llm": TWO}, names=("preprocessing", "tensorrt_llm"))
    assert values(found.ranks[0], "load-model") == ["preprocessing", "tensorrt_llm"]
    assert values(found.ranks[1], "load-model") == ["tensorrt_llm"]


def test_mpirun_has_a_context_for_each_rank(tmp_path: Path) -> None:
    found = plan(tmp_path, {"tensorrt_llm": {"layout": TP2_PP2}})
    command = found.command()[len(found.launcher) :]
    contexts = [list(group) for is_colon, group in itertools.groupby(command, lambda part: part == ":") if not is_colon]
    assert contexts == [["-n", "1", *rank] for rank in found.ranks]
    assert command[-1] != ":"


def test_srun_starts_the_same_ranks(tmp_path: Path) -> None:
    """The script is run by a real bash, which prints instead of starting."""
    options = LaunchOptions(launcher="srun", arguments=("--partition=gpu queue",))
    found = plan(tmp_path / "with space", {"tensorrt_llm": {"layout": TP2_PP2}}, options)
    assert found.launcher[:4] == ("srun", "--ntasks=4", "--nodes=1", "--ntasks-per-node=4")
    assert {"--mpi=pmix", "--kill-on-bad-exit=1", "--partition=gpu queue"} <= set(found.launcher)
    *_, bash, flag, script = found.command()
    for number, rank in enumerate(found.ranks):
        printing = script.replace("exec tritonserver", "printf '%s\\n' tritonserver")
        done = subprocess.run(
            [bash, flag, printing], env={"SLURM_PROCID": str(number)}, capture_output=True, text=True, check=True
        )
        assert tuple(done.stdout.splitlines()) == rank


def test_srun_takes_the_nodes_that_the_engine_was_made_for(tmp_path: Path) -> None:
    mapping = {"world_size": 4, "tp_size": 4, "pp_size": 1, "gpus_per_node": 2}
    models = {"tensorrt_llm": {"layout": TP4, "pretrained": {"mapping": mapping}}}
    found = plan(tmp_path, models, LaunchOptions(launcher="srun"))
    assert found.launcher[1:4] == ("--ntasks=4", "--nodes=2", "--ntasks-per-node=2")
    assert "--hostfile, or use --launcher srun" in refused(tmp_path / "one", models)


@pytest.mark.parametrize("options", [LaunchOptions(), LaunchOptions("srun"), LaunchOptions(multi_model=True)])
def test_what_is_printed_is_what_is_run(options: LaunchOptions, tmp_path: Path) -> None:
    found = plan(tmp_path / "it's here", {"tensorrt_llm": TWO}, options)
    assert found.text().count("\n") >= 2
    words = shlex.split(found.text().replace(" \\\n", " "))
    assert words == [*(f"{key}={value}" for key, value in found.environment.items()), *found.command()]


def test_an_orchestrator_spawns_its_ranks(tmp_path: Path) -> None:
    models = {
        "a": {"layout": TP2, "parameters": {"gpu_device_ids": "0,1;2,3"}, "count": 2},
        "b": {"parameters": {"gpu_device_ids": "4"}},
    }
    found = plan(tmp_path, models, LaunchOptions(multi_model=True))
    assert found.environment == {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "1"}
    (rank,) = found.ranks
    assert found.command()[:6] == ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "1"]
    assert values(rank, "load-model") == []
    assert values(rank, "cuda-memory-pool-byte-size") == [f"{gpu}:0" for gpu in range(5)]
    assert {"--pinned-memory-pool-byte-size=0", "--enable-peer-access=false"} <= set(rank)


def test_an_orchestrator_with_ranks_from_the_beginning(tmp_path: Path) -> None:
    models = {
        "a": {"layout": TP2, "parameters": {"participant_ids": "1,2;5,6"}, "count": 2},
        "b": {"layout": TP2, "parameters": {"participant_ids": "3,4"}},
    }
    found = plan(tmp_path, models, LaunchOptions(multi_model=True, spawn=False))
    assert found.environment == {"TRTLLM_ORCHESTRATOR": "1", "TRTLLM_ORCHESTRATOR_SPAWN_PROCESSES": "0"}
    assert len(found.ranks) == 7
    assert values(found.ranks[0], "load-model") == []
    assert all(values(rank, "load-model") == ["a", "b"] for rank in found.ranks[1:])
    assert not any(values(rank, "cuda-memory-pool-byte-size") for rank in found.ranks)


def test_several_machines(tmp_path: Path) -> None:
    mapping = {"world_size": 4, "tp_size": 4, "pp_size": 1, "gpus_per_node": 2}
    models = {"tensorrt_llm": {"layout": TP4, "pretrained": {"mapping": mapping}}}
    options = hostfile(tmp_path, "# ours", "first slots=2", "", "second.local  slots=2 max_slots=2  # eight more")
    environment = {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HOME": "/root", "TLLM_LOG_LEVEL": "info", "XPATH": "no"}
    found = plan(tmp_path, models, options, environment)
    assert [(one.name, one.slots) for one in found.hosts] == [("first", 2), ("second.local", 2)]
    assert found.launcher[4:] == ("--hostfile", str(tmp_path / "hosts"), "--map-by", "slot")
    exported = [name for flag, name in itertools.pairwise(found.command()) if flag == "-x"]
    assert exported == ["NCCL_DEBUG", "PATH", "TLLM_LOG_LEVEL"] * 4


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


def test_gpu_device_ids_say_what_a_machine_has(tmp_path: Path) -> None:
    """An engine for eight GPUs a node, on machines of two."""
    options = hostfile(tmp_path, "a slots=2", "b slots=2")
    without = {"tensorrt_llm": {"layout": TP4}}
    assert "a: 2 ranks, but the engine is for 8 GPUs a node" in refused(tmp_path / "without", without, options)
    found = plan(tmp_path / "with", {"tensorrt_llm": {"layout": TP4, "parameters": {"gpu_device_ids": "0,1"}}}, options)
    assert len(found.ranks) == 4


def test_lines_of_one_host_add_up(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "a slots=1", "b slots=2", "a slots=3").hostfile
    assert file is not None
    assert [(one.name, one.slots) for one in read_hostfile(file)] == [("a", 4), ("b", 2)]


def test_this_machine_by_its_names() -> None:
    assert all(is_this_machine(name) for name in ("localhost", "127.0.0.1", socket.gethostname()))
    assert not is_this_machine("no-such-host.invalid")


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


def test_a_placeholder_for_gpus_counts_as_none(tmp_path: Path) -> None:
    """As in the C++ backend, which cannot read it either."""
    found = plan(tmp_path, {"m": {"layout": TP2, "parameters": {"gpu_device_ids": "${gpu_device_ids}"}}})
    assert len(found.ranks) == 2


def test_an_engine_inside_the_repository(tmp_path: Path) -> None:
    """gpt_model_path is a container's path, which this machine does not have."""
    repository = make_repository(
        tmp_path, {"m": {"layout": TP2, "parameters": {"gpt_model_path": "/models/m/1/engine"}}}
    )
    (tmp_path / "engines" / "m").rename(repository / "m" / "1" / "engine")
    (found,) = read_trtllm_models(repository, ["m"])
    assert (found.world_size, found.engine.directory) == (2, repository / "m" / "1" / "engine")


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


def test_which_repository_is_one(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    assert has_trtllm_models(repository)
    assert not has_trtllm_models(repository, ["preprocessing"])


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


def test_what_the_user_says_to_srun_is_said_once(tmp_path: Path) -> None:
    found = plan(tmp_path, {"tensorrt_llm": TWO}, LaunchOptions("srun", arguments=("--mpi=pmi2",)))
    assert [part for part in found.launcher if part.startswith("--mpi")] == ["--mpi=pmi2"]
    assert "--kill-on-bad-exit=1" in found.launcher


def test_engines_without_gpus_of_their_own_are_warned_of(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, {"a": {"parameters": {"gpu_device_ids": "0"}}, "b": {}})
    found = serve(repository, "--dry-run", "--multi-model")
    assert found.exit_code == 0, found.output
    assert "WARNING: b: no gpu_device_ids" in found.stderr
    models = read_trtllm_models(repository, ["a"])
    assert launch_warnings(models, LaunchOptions(multi_model=True)) == []


GOLDEN = """\
mpirun --allow-run-as-root --bind-to none \\
-n 1 /opt/tritonserver/bin/tritonserver --model-repository=REPOSITORY --http-address=127.0.0.1 --http-port=8000 \
--grpc-address=127.0.0.1 --grpc-port=8001 --metrics-address=127.0.0.1 --metrics-port=8002 \
--disable-auto-complete-config --backend-config=python,shm-region-prefix-name=prefix0_ --exit-timeout-secs=30 : \\
-n 1 /opt/tritonserver/bin/tritonserver --model-repository=REPOSITORY --http-address=127.0.0.1 --http-port=8003 \
--grpc-address=127.0.0.1 --grpc-port=8004 --metrics-address=127.0.0.1 --metrics-port=8005 \
--model-control-mode=explicit --load-model=tensorrt_llm \
--disable-auto-complete-config --backend-config=python,shm-region-prefix-name=prefix1_ --exit-timeout-secs=30
"""


def serve(repository: Path, *arguments: str) -> Any:
    return CliRunner().invoke(main, ["serve", "--repository", str(repository), *arguments])


def test_dry_run_prints_the_command(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, {"tensorrt_llm": TWO})
    found = serve(repository, "--dry-run")
    assert found.exit_code == 0, found.output
    assert found.stdout == GOLDEN.replace("REPOSITORY", str(repository))
    assert "TensorRT-LLM 1.2.1 is in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in found.stderr


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


def test_what_package_writes_is_served(tmp_path: Path) -> None:
    """The five models: all on rank 0, the engine alone on the others."""
    engine = make_trtllm_engine(tmp_path / "engine", layout=TP2_PP2)
    options = TrtllmOptions(gpu_device_ids=((0, 1, 2, 3),))
    write_repository(
        tmp_path / "models", Passport.open(engine), TrtllmEngine.open(engine), options, prefix="tiny"
    )  # fmt: skip
    found = serve(tmp_path / "models", "--dry-run")
    assert found.exit_code == 0, found.output
    first, *others = [line for line in found.stdout.splitlines() if line.startswith("-n 1 ")]
    assert "--load-model" not in first
    assert len(others) == 3
    assert all(re.findall(r"--load-model=(\S+)", line) == ["tiny_tensorrt_llm"] for line in others)
