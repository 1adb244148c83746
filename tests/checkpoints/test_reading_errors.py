"""A bad checkpoint is one clear error that names what is bad, before any weight is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import hf_config, random_weights, save_checkpoint

from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, Refused, TrtBuildError

INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Three shards and an index; one file is damaged in each test."""
    return save_checkpoint(tmp_path / "some-llama", hf_config("llama"), shards=3)


def fails(directory: Path, *parts: str, error: type[TrtBuildError] = CheckpointError) -> None:
    """Opening it raises `error`, whose message holds every part (regular expressions) and no traceback noise."""
    with pytest.raises(TrtBuildError) as caught:
        CheckpointSource.open(str(directory))
    assert type(caught.value) is error, caught.value
    assert caught.value.exit_code == (3 if error is Refused else 1)
    for part in parts:
        assert re.search(part, caught.value.message), caught.value.message
    assert str(directory) not in caught.value.message or "\n" not in caught.value.message.strip()


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a file's header and leave its data."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def first_tensor(header: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The one whose data come first."""
    named = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return min(named, key=lambda pair: pair[1]["data_offsets"])


@pytest.mark.parametrize("keep", [0, 4, 8, 200, -1, -1000])
def test_truncated_shard(checkpoint: Path, keep: int) -> None:
    file = checkpoint / SHARD
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    fails(checkpoint, re.escape(SHARD), "truncated")


def test_bytes_after_the_last_tensor(checkpoint: Path) -> None:
    with (checkpoint / SHARD).open("ab") as stream:
        stream.write(b"12345")
    fails(checkpoint, re.escape(SHARD), "5 bytes after the last tensor")


@pytest.mark.parametrize("length", [2**63, 10**9, 100_000_001])
def test_header_length_lies(checkpoint: Path, length: int) -> None:
    with (checkpoint / SHARD).open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    fails(checkpoint, re.escape(SHARD), f"header of {length} bytes", "truncated or not safetensors")


@pytest.mark.parametrize(("length", "message"), [(2, "no valid JSON"), (50, "no valid JSON")])
def test_header_length_is_short(checkpoint: Path, length: int, message: str) -> None:
    with (checkpoint / SHARD).open("r+b") as stream:
        stream.write(struct.pack("<Q", length))
    fails(checkpoint, re.escape(SHARD), message)


@pytest.mark.parametrize("text", [b"[1, 2]", b"null", b'"text"', b"{", b"\xff\xfe{}", b"[" * 100_000, b"1" * 5000])
def test_header_is_not_an_object(checkpoint: Path, text: bytes) -> None:
    (checkpoint / SHARD).write_bytes(struct.pack("<Q", len(text)) + text)
    fails(checkpoint, re.escape(SHARD), "no valid JSON object")


HEADER_CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "offsets out of range": ({"data_offsets": [0, 10**12]}, "lie outside the .* truncated or damaged"),
    "negative offset": ({"data_offsets": [-2, 10]}, "whole numbers from 0"),
    "offsets backwards": ({"data_offsets": [10, 4]}, "lie outside"),
    "three offsets": ({"data_offsets": [0, 1, 2]}, "lacks dtype, shape or data_offsets"),
    "offsets are text": ({"data_offsets": ["0", "4"]}, "whole numbers"),
    "no offsets": ({"data_offsets": None}, "lacks dtype, shape or data_offsets"),
    "unknown dtype": ({"dtype": "BF17"}, "dtype 'BF17' is not one of .*BF16"),
    "dtype is a list": ({"dtype": ["BF16"]}, r"dtype \['BF16'\] is not one of"),
    "shape too large": ({"shape": [10**6, 10**6]}, "takes 2000000000000 bytes, the header gives"),
    "negative shape": ({"shape": [-1, -64]}, "whole numbers from 0"),
    "shape is a number": ({"shape": 64}, "shape 64"),
    "shape of fractions": ({"shape": [1.5, 2]}, "whole numbers"),
    "shape of booleans": ({"shape": [True, 64]}, "whole numbers"),
}


@pytest.mark.parametrize("name", HEADER_CHANGES)
def test_header_contradicts_the_file(checkpoint: Path, name: str) -> None:
    change, message = HEADER_CHANGES[name]
    tensor = ""

    def apply(header: dict[str, Any]) -> None:
        nonlocal tensor
        tensor, entry = first_tensor(header)
        entry |= change

    rewrite_header(checkpoint / SHARD, apply)
    fails(checkpoint, re.escape(SHARD), re.escape(repr(tensor)), message)


def test_entry_is_no_object(checkpoint: Path) -> None:
    rewrite_header(checkpoint / SHARD, lambda header: header.update({Q: 7}))
    fails(checkpoint, re.escape(SHARD), Q, "lacks dtype")


def test_overlap(checkpoint: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        by_start = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"])
        first, second = by_start[0], by_start[1]
        size = second["data_offsets"][1] - second["data_offsets"][0]
        second["data_offsets"] = [first["data_offsets"][0] + 2, first["data_offsets"][0] + 2 + size]

    rewrite_header(checkpoint / SHARD, overlap)
    fails(checkpoint, re.escape(SHARD), r"begins at byte \d+, expected \d+")


def test_gap(checkpoint: Path) -> None:
    def drop(header: dict[str, Any]) -> None:
        del header[first_tensor(header)[0]]

    rewrite_header(checkpoint / SHARD, drop)
    fails(checkpoint, re.escape(SHARD), r"begins at byte \d+, expected \d+")


def test_missing_from_the_index_and_the_file_set(checkpoint: Path) -> None:
    """A shard that the index does not mention is not read; its tensors are then missing, all of them named."""
    index = json.loads((checkpoint / INDEX).read_text())
    gone = [name for name, file in index["weight_map"].items() if file == SHARD]
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SHARD}
    (checkpoint / INDEX).write_text(json.dumps(index))
    fails(checkpoint, "some-llama", *(f"{re.escape(name)}' is missing" for name in gone))


def test_index_names_the_wrong_shard(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    name, file = next((n, f) for n, f in index["weight_map"].items() if f == SHARD)
    index["weight_map"][name] = file.replace("00002", "00001")
    (checkpoint / INDEX).write_text(json.dumps(index))
    fails(checkpoint, re.escape(name), "model-00001-of-00003.safetensors", "where it is not")


def test_index_names_a_tensor_that_is_nowhere(checkpoint: Path) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"]["model.extra"] = SHARD
    (checkpoint / INDEX).write_text(json.dumps(index))
    fails(checkpoint, "'model.extra'", re.escape(SHARD), "where it is not")


def test_tensor_in_two_shards(checkpoint: Path) -> None:
    other = "model-00001-of-00003.safetensors"
    shutil.copy(checkpoint / SHARD, checkpoint / other)
    fails(checkpoint, f"is both in {other} and in {SHARD}")


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "..", ".", "sub/model.safetensors", "gone.safetensors", ""]
)
def test_index_names_a_file_outside(checkpoint: Path, name: str) -> None:
    shutil.copy(checkpoint / SHARD, checkpoint.parent / "evil.safetensors")
    (checkpoint / "sub").mkdir()
    shutil.copy(checkpoint / SHARD, checkpoint / "sub" / "model.safetensors")
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"] = {tensor: name if file == SHARD else file for tensor, file in index["weight_map"].items()}
    (checkpoint / INDEX).write_text(json.dumps(index))
    fails(checkpoint, "the index names", re.escape(repr(name)), "not a file of this checkpoint")


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'])
def test_index_without_a_weight_map(checkpoint: Path, content: str) -> None:
    (checkpoint / INDEX).write_text(content)
    fails(checkpoint, re.escape(INDEX), "weight_map")


@pytest.mark.parametrize("file", ["config.json", INDEX])
@pytest.mark.parametrize(("content", "message"), [
    (b"{ not json", "is no valid JSON"), (b"", "is no valid JSON"), (b"\xff\xfe\x00", "is no valid JSON"),
    (b"[]", "not a JSON object"),
])  # fmt: skip
def test_json_files_that_are_none(checkpoint: Path, file: str, content: bytes, message: str) -> None:
    (checkpoint / file).write_bytes(content)
    fails(checkpoint, re.escape(file), message)


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    fails(checkpoint, "some-llama", "no config.json", "Hugging Face checkpoint")


def test_no_weights(checkpoint: Path) -> None:
    for file in (*checkpoint.glob("*.safetensors"), checkpoint / INDEX):
        file.unlink()
    fails(checkpoint, "some-llama", r"no \*\.safetensors")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl"])
def test_only_pickles(checkpoint: Path, name: str) -> None:
    for file in (*checkpoint.glob("*.safetensors"), checkpoint / INDEX):
        file.unlink()
    (checkpoint / name).write_bytes(b"\x80\x04.")
    fails(checkpoint, "some-llama", re.escape(name), "pickle", "convert it to safetensors", error=Refused)


def reject_weights(tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], *parts: str) -> None:
    weights = random_weights(hf_config("llama"))
    change(weights)
    fails(save_checkpoint(tmp_path / "hf", hf_config("llama"), weights), *parts)


def test_wrong_shape(tmp_path: Path) -> None:
    reject_weights(
        tmp_path, lambda w: w.update({Q: w[Q][:64]}), f"{Q}' has shape \\[64, 64\\], config.json implies \\[128, 64\\]"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8, torch.float8_e4m3fn, torch.float64])
def test_weight_of_another_type(tmp_path: Path, dtype: torch.dtype) -> None:
    reject_weights(tmp_path, lambda w: w.update({Q: w[Q].to(dtype)}), f"{Q}' is [IUF]", "BF16, F16 and F32 are read")


def test_extra_weight(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    reject_weights(tmp_path, lambda w: w.update({name: torch.ones(16)}), f"{name}' has no place in LlamaForCausalLM")


def test_extra_layer(tmp_path: Path) -> None:
    name = "model.layers.3.input_layernorm.weight"
    reject_weights(tmp_path, lambda w: w.update({name: torch.ones(64)}), f"{name}' has no place")


def test_bias_that_the_config_denies(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    reject_weights(tmp_path, lambda w: w.update({name: torch.ones(128)}), f"{name}' has no place")


def test_every_problem_of_the_weights_at_once(tmp_path: Path) -> None:
    def break_many(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]
        weights[Q] = weights[Q].T.contiguous()
        weights["other"] = torch.ones(1)

    reject_weights(tmp_path, break_many, "model.norm.weight' is missing", f"{Q}' has shape", "'other' has no place")


def test_rotary_frequencies_in_the_file_are_no_weights(tmp_path: Path) -> None:
    """Old Llama checkpoints hold them."""
    weights = random_weights(hf_config("llama"))
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    source = CheckpointSource.open(str(save_checkpoint(tmp_path, hf_config("llama"), weights)))
    assert len(source.entries) == len(weights)


def test_tied_but_another_lm_head(tmp_path: Path) -> None:
    """transformers would not tie these; dropping the file's lm_head would be another model."""
    config = hf_config("qwen2", tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    fails(save_checkpoint(tmp_path / "hf", config, weights), "lm_head.weight", "tie_word_embeddings")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", [Q, "model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_not_a_number(tmp_path: Path, bad: float, name: str, precision: Any) -> None:
    weights = random_weights(hf_config("llama"))
    weights[name].view(-1)[-1] = bad
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf_config("llama"), weights)))
    with pytest.raises(CheckpointError, match="holds NaN or Inf") as caught:
        convert(source, tmp_path / "out", Layout.resolve(2), Precision(precision, "bf16"))
    assert caught.value.exit_code == 1
    canonical = {Q: "layers.1.q", "model.embed_tokens.weight": "embedding", "model.norm.weight": "final_norm"}
    assert caught.value.message.startswith(canonical.get(name, "layers.2.down"))
    assert not (tmp_path / "out").exists()


def test_too_large_for_fp16(tmp_path: Path) -> None:
    weights = random_weights(hf_config("llama"))
    weights[Q][0, 0] = 70000.0
    source = CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf_config("llama"), weights)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.q: 7.*e\+04 does not fit fp16 .*bf16"):
        convert(source, tmp_path / "out", Layout(), Precision("fp16", "fp16"))


def test_the_hub_is_asked_only_for_what_can_be_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for model in ("no-such-model", "./no-such-model", "/no/such/model", "a/b/c", "~nobody/x"):
        with pytest.raises(Refused, match=f"{re.escape(repr(model))}: no such directory.*tiny-mixtral"):
            CheckpointSource.open(model)
    with pytest.raises(TrtBuildError, match="hub"):
        CheckpointSource.open("bad name!/x")
    with pytest.raises(CheckpointError, match=r"cannot fetch some/model from the hub.*HF_TOKEN") as caught:
        CheckpointSource.open("some/model")
    assert "\n" not in caught.value.message
