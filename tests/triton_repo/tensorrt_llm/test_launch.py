"""The command that serves TensorRT-LLM engines: a process for each rank, its launcher, and what it says."""

from __future__ import annotations

import itertools
import re
import shlex
import socket
import subprocess
from pathlib import Path

import pytest
from fake_ranks import make_repository
from launch_plans import TP2, TP2_PP2, TP4, TWO, hostfile, plan, refused, serve
from trtllm_engine import make_trtllm_engine

from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import Refused
from trtbuild.triton_repo.tensorrt_llm.hostfile import is_this_machine, read_hostfile
from trtbuild.triton_repo.tensorrt_llm.launch import LaunchOptions, launch_warnings
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import write_repository
from trtbuild.triton_repo.tensorrt_llm.served_models import has_trtllm_models, read_trtllm_models
from trtbuild.triton_repo.triton_process import Ports


def values(rank: tuple[str, ...], name: str) -> list[str]:
    return [part.partition("=")[2] for part in rank if part.startswith(f"--{name}=")]


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


def test_which_repository_is_one(tmp_path: Path) -> None:
    repository = make_repository(tmp_path)
    assert has_trtllm_models(repository)
    assert not has_trtllm_models(repository, ["preprocessing"])


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


def test_dry_run_prints_the_command(tmp_path: Path) -> None:
    repository = make_repository(tmp_path, {"tensorrt_llm": TWO})
    found = serve(repository, "--dry-run")
    assert found.exit_code == 0, found.output
    assert found.stdout == GOLDEN.replace("REPOSITORY", str(repository))
    assert "TensorRT-LLM 1.2.1 is in nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3" in found.stderr


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
