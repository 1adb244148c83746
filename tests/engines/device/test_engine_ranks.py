"""A compiled engine directory through the whole load: passport, plans, weights, slots, runtime cache, answers.

The GPU and TensorRT's runtime are fakes that evaluate the networks; `pytest -m gpu` runs the same on a real one.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers import some_tokens

pytest.importorskip("tensorrt_rtx")

from fake_tensorrt import GPU, FakeDevice, FakeTensorRT

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.cli import main
from trtbuild.engines.compile import compile_engine
from trtbuild.engines.device import choice, engine_ranks, gpu
from trtbuild.engines.job import Job
from trtbuild.engines.load import cache_bytes_per_token, load_engine
from trtbuild.engines.passport import Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt.network import build_network
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, plan_tasks
from trtbuild.errors import Refused
from trtbuild.workspace import Workspace

SIZES = {"target": ("sm89",), "max_batch_size": 2, "max_seq_len": 128, "chunk_size": 64}
VOCAB = 1000


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe.create(model="tiny-mixtral", precision="fp16", **SIZES)  # type: ignore[arg-type]
    return compile_engine(Job.resolve(recipe), Workspace(tmp_path_factory.mktemp("ws")), workers=1).directory


@pytest.fixture
def fake_gpu(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    """This machine has an L-something with TensorRT-RTX; plan files stand for their networks."""
    passport, checkpoint = Passport.open(engine_dir), RankCheckpoint.open(engine_dir)
    device, plans = FakeDevice(wide=False), {}
    for task in plan_tasks(checkpoint.plans, BuildOptions(passport.limits, ("sm89",)), "digest"):
        content = (engine_dir / "plans" / f"{task.name}.plan").read_bytes()
        plans[content] = build_network(task.plan, task.segment, task.phase, passport.limits)  # type: ignore[arg-type]
    trt = FakeTensorRT(plans, device)
    monkeypatch.setattr(gpu, "find_gpus", lambda: [GPU])
    monkeypatch.setattr(engine_ranks, "find_gpus", lambda: [GPU])
    monkeypatch.setattr(engine_ranks, "CudaDevice", lambda _: device)
    monkeypatch.setattr(engine_ranks, "import_library", lambda _: trt)
    return trt


def test_load_runs_the_plans_and_says_so(
    engine_dir: Path, fake_gpu: FakeTensorRT, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trtbuild")
    executor: Any = load_engine(engine_dir).executor
    reference = load_engine(engine_dir, executor="reference", dtype="float32").executor
    assert (executor.name, executor.num_slots, reference.name) == ("tensorrt", 2, "reference")
    assert f"tensorrt executor: 1 x {GPU.name} (sm89) can run the engine's plans" in caplog.text
    assert "2 slots of 128 tokens" in caplog.text
    tokens = some_tokens(70, VOCAB)
    for engine in (executor, reference):
        engine.prefill(1, tokens[:64], 0, "none")
    found, expected = (engine.prefill(1, tokens[64:], 64, "all") for engine in (executor, reference))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999  # type: ignore[arg-type]
    found, expected = (engine.decode([1], [3], [70]) for engine in (executor, reference))
    assert torch.nn.functional.cosine_similarity(found, expected, dim=-1).min() > 0.999
    executor.close()


def test_warming_fills_the_cache_once(engine_dir: Path, fake_gpu: FakeTensorRT) -> None:
    for file in (engine_dir / "runtime_cache").glob("*"):
        file.unlink()
    first, second = engine_ranks.warm(engine_dir), engine_ranks.warm(engine_dir)
    (file,) = (engine_dir / "runtime_cache").iterdir()
    assert file.stat().st_size == first.cache_bytes == second.cache_bytes > 100
    assert (first.was_warm, second.was_warm) == (False, True)
    # The cache is no part of what the passport vouches for.
    Passport.open(engine_dir).check_files()


def test_slots_that_do_not_fit_are_refused_with_both_sizes(engine_dir: Path, fake_gpu: FakeTensorRT) -> None:
    with pytest.raises(Refused, match=r"3 slots of 128 tokens take .* GiB are free .* ask for 1 to 2 slots"):
        load_engine(engine_dir, num_slots=3)
    fake_gpu.device.free = 2**28
    with pytest.raises(Refused, match="1 slots of 128 tokens take"):
        load_engine(engine_dir)


def test_without_a_gpu_tensorrt_is_refused_and_auto_falls_back(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu, "find_gpus", list)
    assert choice.examine_machine(Passport.open(engine_dir)).library_version is None
    arguments = ["generate", engine_dir.name, "A", "--executor", "tensorrt", "--workspace", str(engine_dir.parents[1])]
    result = CliRunner().invoke(main, arguments)
    if not torch.cuda.is_available():
        assert result.exit_code == 3
        assert f"{engine_dir.name} cannot run here: torch sees no CUDA GPU" in result.output
    caplog.set_level(logging.INFO, "trtbuild")
    engine = load_engine(engine_dir, num_slots=1)
    assert engine.executor.name == "reference"
    assert "reference executor: torch sees no CUDA GPU" in caplog.text


def test_cache_bytes_follow_from_the_plans(engine_dir: Path) -> None:
    config = Passport.open(engine_dir).config
    assert cache_bytes_per_token(Passport.open(engine_dir)) == 2 * 2 * (
        config.num_layers * config.num_kv_heads * config.head_dim
    )
