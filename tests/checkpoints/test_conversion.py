"""Conversion as a command: the same request or another, one worker or many, what the manifest says, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import LAYOUT, contents, ranges_of, run
from helpers import hf_config, make_checkpoint, random_weights, save_checkpoint

from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, Refused

pytestmark = pytest.mark.usefixtures("journal_at_once")


def test_one_or_many_workers_write_the_same_bytes(source: CheckpointSource, tmp_path: Path) -> None:
    for precision in ("bf16", "int8", "int4", "fp8"):
        run(source, tmp_path / f"{precision}1", precision)
        run(source, tmp_path / f"{precision}4", precision, workers=4)
        assert contents(tmp_path / f"{precision}1") == contents(tmp_path / f"{precision}4")


def test_an_error_in_a_worker_stops_the_conversion(tmp_path: Path) -> None:
    weights = random_weights(hf_config("mixtral"))
    weights["model.layers.0.block_sparse_moe.experts.2.w1.weight"][0, 0] = float("nan")
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf_config("mixtral"), weights)))
    with pytest.raises(CheckpointError, match=r"layers\.0\.experts\.2\.gate holds NaN"):
        run(source, tmp_path / "out", "bf16", workers=3)


def test_an_unchanged_request_does_nothing(source: CheckpointSource, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "fp8")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    calibrations: list[int] = []

    def calibrate() -> dict[str, ActivationRange]:
        calibrations.append(1)
        return ranges_of(source)

    convert(
        source, tmp_path / "out", LAYOUT, Precision("fp8", "bf16"), calibration=Calibration({"text": "x"}, calibrate)
    )
    assert {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    assert not calibrations


@pytest.mark.parametrize("change", ["layout", "precision", "calibration", "source"])
def test_another_request_is_refused_unless_forced(source: CheckpointSource, tmp_path: Path, change: str) -> None:
    arguments: dict[str, Any] = {
        "source": source, "layout": LAYOUT, "precision": Precision("fp8", "bf16"),
        "calibration": Calibration({"text": "x"}, lambda: ranges_of(source)),
    }  # fmt: skip
    convert(directory=tmp_path / "out", **arguments)
    if change == "source":
        other = make_checkpoint(tmp_path / "hf", "mixtral", num_hidden_layers=2, seed=5)
        changed: dict[str, Any] = {"source": CheckpointSource.open(str(other))}
    else:
        changed = {
            "layout": {"layout": Layout.resolve(2)}, "precision": {"precision": Precision("fp8", "fp16")},
            "calibration": {"calibration": Calibration({"text": "y"}, lambda: ranges_of(source, 5.0))},
        }[change]  # fmt: skip
    with pytest.raises(Refused, match=rf"--force.*\n  - {change}: ") as refusal:
        convert(directory=tmp_path / "out", **arguments | changed)
    assert refusal.value.exit_code == 3
    convert(directory=tmp_path / "out", **arguments | changed, force=True)
    convert(directory=tmp_path / "fresh", **arguments | changed)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_layout_that_does_not_fit_leaves_nothing_behind(source: CheckpointSource, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="layout tp 3"):
        convert(source, tmp_path / "build" / "out", Layout.resolve(3), Precision("bf16", "bf16"))
    assert not (tmp_path / "build").exists()
    narrow = CheckpointSource.open(str(make_checkpoint(tmp_path / "hf", "llama", intermediate_size=72)))
    with pytest.raises(Refused, match=r"int4: the input of transformer\.layers\.0\.mlp\.proj is 36 wide"):
        convert(narrow, tmp_path / "build" / "out", Layout.resolve(2), Precision("int4", "bf16"))
    assert not (tmp_path / "build").exists()


def test_a_full_disk_is_refused_before_writing(
    source: CheckpointSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))  # type: ignore[attr-defined]
    with pytest.raises(Refused, match=r"the rank checkpoint takes .* MiB, 0\.0 MiB are free"):
        run(source, tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.safetensors"))


def manifest_of(checkpoint: RankCheckpoint) -> dict[str, Any]:
    return checkpoint.authority["tensors"]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4", "fp8"])
def test_the_manifest_says_what_every_tensor_got(
    source: CheckpointSource, tmp_path: Path, precision: PrecisionName
) -> None:
    checkpoint = run(source, tmp_path / "out", precision, provenance={"recipe": {"model": "m"}})
    manifest = manifest_of(checkpoint)
    linears = {
        f"transformer.layers.{i}.{name}"
        for i in range(2)
        for name in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.proj")
    }
    plain = {
        f"transformer.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("input_layernorm", "post_layernorm", "mlp.router")
    }
    plain |= {"transformer.vocab_embedding.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert set(manifest) == linears | {f"rank{rank}/{name}" for rank in range(2) for name in plain}
    assert {manifest[name]["precision"] for name in linears} == {precision}
    assert {name: entry["precision"] for name, entry in manifest.items() if name not in linears} == {
        f"rank{rank}/{name}": "float32" if "router" in name else "bfloat16" for rank in range(2) for name in plain
    }
    fc = manifest["transformer.layers.0.mlp.fc"]
    if precision != "bf16":
        name = "transformer.layers.0.mlp.fc." + (
            "per_channel_scale" if precision == "int8" else "weights_scaling_factor"
        )
        stored = [checkpoint.tensor(rank, name).float() for rank in range(2)]
        assert fc["scale_min"] == min(float(scales.min()) for scales in stored)
        assert fc["scale_max"] == max(float(scales.max()) for scales in stored)
    # Measured on normal weights: int8 0.0066, int4 0.097 at group 64, fp8 0.026.
    low, high = {"bf16": (0, 0), "int8": (0.004, 0.009), "int4": (0.07, 0.13), "fp8": (0.02, 0.03)}[precision]
    assert low <= fc.get("relative_error", 0) <= high
    assert fc.get("group_size") == (64 if precision == "int4" else None)
    assert fc.get("calibration_tokens_per_expert") == ([7, 5, 3, 1] if precision == "fp8" else None)
    assert fc.get("activation_scale") == (pytest.approx(3 / 448, rel=1e-6) if precision == "fp8" else None)
    authority = checkpoint.authority
    assert authority["recipe"] == {"model": "m"}
    assert authority["source"]["digest"] == source.digest
    assert (checkpoint.config, checkpoint.layout) == (source.config, LAYOUT)


def test_a_kv_head_on_two_ranks_has_one_fp8_scale(tmp_path: Path) -> None:
    """All ranks' qkv share the scale of the largest of q, k and v; an expert's up and gate share one too."""
    config = hf_config("mixtral", num_hidden_layers=1)
    weights = random_weights(config)
    weights["model.layers.0.self_attn.k_proj.weight"][0, 0] = 40.0
    weights["model.layers.0.block_sparse_moe.experts.3.w3.weight"][5, 5] = -56.0
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", config, weights)))
    calibration = Calibration({}, lambda: ranges_of(source))
    checkpoint = convert(
        source, tmp_path / "out", Layout.resolve(4, 1, 2, 2), Precision("fp8", "bf16"), calibration=calibration
    )
    for rank in range(4):
        scale = checkpoint.tensor(rank, "transformer.layers.0.attention.qkv.weights_scaling_factor")
        assert scale.tolist() == torch.tensor([40.0]).div(448).tolist()
        experts = checkpoint.tensor(rank, "transformer.layers.0.mlp.fc.weights_scaling_factor")
        assert experts.shape == (2, 1)
        assert (float(experts[1, 0]) == float(torch.tensor(56.0) / 448)) == (rank % 2 == 1)


def test_a_finished_checkpoint_opens_only_whole(source: CheckpointSource, tmp_path: Path) -> None:
    run(source, tmp_path / "out", "int8")

    def damaged(change: str) -> str:
        directory = tmp_path / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(tmp_path / "out", directory)
        file = directory / "trtbuild.json"
        authority = json.loads(file.read_text())
        if change == "rank":
            (directory / "rank1.safetensors").unlink()
        elif change == "truncated":
            os.truncate(directory / "rank0.safetensors", 5000)
        elif change == "swapped":
            shutil.copy(tmp_path / "bf16" / "rank0.safetensors", directory / "rank0.safetensors")
        elif change == "no authority":
            file.unlink()
        else:
            file.write_text(
                json.dumps(
                    {k: v for k, v in authority.items() if k != change} | ({"format": 99} if change == "format" else {})
                )
            )
        with pytest.raises(CheckpointError) as caught:
            RankCheckpoint.open(directory)
        return caught.value.message

    run(source, tmp_path / "bf16", "bf16")
    assert "rank1.safetensors is missing" in damaged("rank")
    assert "rank0.safetensors" in damaged("truncated")
    assert "rank0.safetensors: tensor 'transformer.layers.0.attention.dense.per_channel_scale' is None" in damaged(
        "swapped"
    )
    assert "trtbuild.json is missing" in damaged("no authority")
    assert "format 99, this trtbuild reads 2" in damaged("format")
    for key in ("model", "layout", "precision"):
        assert "trtbuild.json" in damaged(key)
