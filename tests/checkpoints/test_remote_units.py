"""Conversion over a pool: the same bytes as by threads, in whatever order batches end and wherever they are cut off."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_checkpoint
from safetensors.torch import save_file

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.journal import Journal
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.lora import LoraAdapter
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.remote_units import BATCH_BYTES, _opened, cut_into_batches
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import Refused

LAYOUT = Layout.resolve(2, 1, 1, 2)


class PicklingPool:
    """Runs tasks here, in another order, after what a cluster does to them; ends with OSError after `limit` of them."""

    num_workers = 3

    def __init__(self, limit: int = 10**9, before: Callable[[], None] = lambda: None) -> None:
        self.sizes: list[int] = []
        self._limit, self._before = limit, before

    def run(
        self, function: Callable[[Any], Any], items: Iterable[Any], *, memory_bytes: int = 0, own_process: bool = False
    ) -> Generator[Any, None, None]:
        tasks = [pickle.dumps((function, item)) for item in items]
        self.sizes += map(len, tasks)
        random.Random(4).shuffle(tasks)
        self._before()
        for number, task in enumerate(tasks):
            if number == self._limit:
                raise OSError(5, "the cluster is gone")
            there, item = pickle.loads(task)
            here = Path.cwd()
            os.chdir("/")
            try:
                result = pickle.dumps(there(item))
            finally:
                os.chdir(here)
            yield pickle.loads(result)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hf") / "m", "mixtral", num_hidden_layers=2, shards=2)


def run(model: Path | CheckpointSource, out: Path, precision: PrecisionName, pool: Any = None) -> RankCheckpoint:
    source = CheckpointSource.open(str(model)) if isinstance(model, Path) else model
    plan = plan_rank(source.config, Layout().rank(0), Precision("fp8", "bf16"))
    ranges = {linear.global_name: ActivationRange(3.0) for linear in plan.linears}
    calibration = Calibration({"text": "x"}, lambda: ranges) if precision == "fp8" else None
    return convert(source, out, LAYOUT, Precision(precision, "bf16"), calibration=calibration, pool=pool)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.mark.parametrize("precision", ["bf16", "fp8", "int8", "int4"])
def test_the_same_bytes_as_by_threads(model: Path, tmp_path: Path, precision: PrecisionName) -> None:
    run(model, tmp_path / "local", precision)
    pool = PicklingPool()
    verify_content(run(model, tmp_path / "pool", precision, pool))
    assert contents(tmp_path / "pool") == contents(tmp_path / "local")
    assert len(pool.sizes) > 4
    # Keys and facts, no headers and no weights, of which a batch has 60,000 bytes.
    assert max(pool.sizes) < 8000


@pytest.mark.parametrize("pool_first", [True, False])
def test_interrupted_it_goes_on_by_the_other_way(model: Path, tmp_path: Path, pool_first: bool) -> None:
    run(model, tmp_path / "whole", "int4")
    out = tmp_path / "out"
    with pytest.raises(OSError, match="the cluster is gone"):
        run(model, out, "int4", PicklingPool(limit=3))
    finished = len(Journal(tmp_path / ".out.partial" / "journal.jsonl").entries)
    assert finished >= 3
    rest = PicklingPool()
    run(model, out, "int4", rest if pool_first else None)
    assert contents(out) == contents(tmp_path / "whole")


def test_adapters_named_by_relative_paths(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker stands in another folder than the command."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    weights = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight": torch.full(shape, 0.25)
        for part, shape in (("A", (2, 64)), ("B", (128, 2)))
    }
    save_file(weights, adapter / "adapter_model.safetensors")
    monkeypatch.chdir(tmp_path)
    source = CheckpointSource.open(str(model)).with_lora([LoraAdapter.open(Path("adapter"))])
    run(source, Path("local"), "bf16")
    run(source, Path("pool"), "bf16", PicklingPool())
    assert contents(tmp_path / "pool") == contents(tmp_path / "local")
    run(model, tmp_path / "plain", "bf16")
    assert contents(tmp_path / "plain")["rank0.safetensors"] != contents(tmp_path / "pool")["rank0.safetensors"]


def test_a_worker_that_sees_another_source_is_refused(model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy" / "m"
    shutil.copytree(model, copy)

    def replace_it() -> None:
        _opened.cache_clear()
        make_checkpoint(copy, "mixtral", num_hidden_layers=2, shards=2, seed=9)

    with pytest.raises(Refused, match=r"does not see .*copy/m as this machine does \(another content\); .* URL"):
        run(copy, tmp_path / "out", "bf16", PicklingPool(before=replace_it))
    with pytest.raises(Refused, match=r"as this machine does \(.*config.json"):
        run(copy, tmp_path / "out", "bf16", PicklingPool(before=lambda: shutil.rmtree(copy)))
    assert not (tmp_path / "out").exists()


def test_batches() -> None:
    keys = [str(i) for i in range(10)]
    assert cut_into_batches(keys, [10] * 10, 1) == [("0", "1"), ("2", "3"), ("4", "5"), ("6", "7"), ("8", "9")]
    large = cut_into_batches(keys, [BATCH_BYTES // 3] * 10, 1)
    assert [len(batch) for batch in large] == [2, 2, 2, 2, 2]
    assert [len(batch) for batch in cut_into_batches(keys, [BATCH_BYTES * 2] * 10, 1)] == [1] * 10
    assert cut_into_batches([], [], 4) == []
