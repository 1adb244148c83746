"""What a checkpoint is opened as: found by name, told apart by its digest, never changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_MIXTRAL, hf_config, random_weights, save_checkpoint

from trtbuild.checkpoints.source import CheckpointSource


def test_bundled_models_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = CheckpointSource.open("tiny-mixtral")
    assert source.directory == TINY_MIXTRAL
    assert len(source.entries) == 3 + 3 * (6 + 1 + 24)


def test_the_digest_sees_config_names_types_and_ends(tmp_path: Path) -> None:
    weights = random_weights(hf_config("llama"))

    def digest(config: dict[str, Any], weights: dict[str, torch.Tensor], shards: int = 1) -> str:
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        return CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", config, weights, shards=shards))).digest

    base, name = digest(hf_config("llama"), weights), "model.layers.1.self_attn.q_proj.weight"
    assert digest(hf_config("llama"), weights, shards=2) == base
    changed = {key: tensor.clone() for key, tensor in weights.items()}
    changed[name][0, 0] += 1
    last = {key: tensor.clone() for key, tensor in weights.items()}
    last[name][-1, -1] += 1
    others = [
        digest(hf_config("llama", rope_theta=10001.0), weights), digest(hf_config("llama"), changed),
        digest(hf_config("llama"), last), digest(hf_config("llama"), {n: t.half() for n, t in weights.items()}),
    ]  # fmt: skip
    assert len({base, *others}) == 5


def test_views_of_a_checkpoint_cannot_change_it(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path / "some-llama", hf_config("llama"), shards=3)
    source = CheckpointSource.open(str(checkpoint))
    before = {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")}
    source.tensor("layers.1.q").zero_()
    assert {file.name: file.read_bytes() for file in checkpoint.glob("*.safetensors")} == before
