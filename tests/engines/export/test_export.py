"""Exports as directories: the same from every layout, whole or not there, with companions, and refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import TWO_BY_TWO, WIDE, Case, all_tensors, converted, exported, keep
from hub_packing import tool_made

from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm, Precision
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.export import writer
from trtbuild.engines.export.export import RECORD, Companions, export_checkpoint
from trtbuild.engines.export.modules import ModuleList
from trtbuild.engines.export.tensors import ExportTensor
from trtbuild.errors import CheckpointError, Refused


@pytest.mark.parametrize("layout", [TWO_BY_TWO, Layout.resolve(2, 3, 1, 2), Layout.resolve(4, 1, 1, 4)])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_the_layout_leaves_no_trace(layout: Layout, precision: Any, tmp_path: Path) -> None:
    case = Case("mixtral", precision)
    one = exported(tmp_path / "one", case)
    other = exported(tmp_path / "other", replace(case, layout=layout))
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_files_of_bounded_size_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files with an index, every tensor in one; made in small blocks, they are the same tensors."""
    checkpoint, source = converted(tmp_path, Case("mixtral", "fp8"))
    companions = Companions((source,))
    export_checkpoint(checkpoint, companions, tmp_path / "whole")
    blocks: list[int] = []
    rows = ModuleList(checkpoint).parts.__class__.rows

    def recorded(self: Any, weight: Any, role: str, start: int, stop: int) -> torch.Tensor:
        found = rows(self, weight, role, start, stop)
        blocks.append(found.nbytes)
        return found

    monkeypatch.setattr(writer, "_BLOCK_BYTES", 4096)
    monkeypatch.setattr("trtbuild.engines.export.rank_parts.RankParts.rows", recorded)
    done = export_checkpoint(checkpoint, companions, tmp_path / "parts", max_shard_bytes=60_000)
    assert max(blocks) <= 4096
    files = sorted(file.name for file in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) == done.num_files > 4
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    whole, parts = all_tensors(tmp_path / "whole"), all_tensors(tmp_path / "parts")
    assert set(index["weight_map"]) == set(whole) == set(parts)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values()) == done.num_bytes
    assert all(torch.equal(whole[name].view(torch.uint8), parts[name].view(torch.uint8)) for name in whole)
    assert all(sum(t.nbytes for t in all_of(tmp_path / "parts" / name)) <= 60_000 for name in files)


def all_of(file: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(file).values())


def test_an_interrupted_export_goes_on_and_shows_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, source = converted(tmp_path, Case("mixtral", "fp8"))
    companions, target = Companions((source,)), tmp_path / "export"
    written: list[str] = []
    write = writer._write_file

    def dying(file: Path, tensors: list[ExportTensor], advance: writer.Advance) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(file.name)
        write(file, tensors, advance)

    monkeypatch.setattr(writer, "_write_file", dying)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, companions, target, max_shard_bytes=60_000)
    assert not target.exists()
    monkeypatch.setattr(writer, "_write_file", lambda *given: (written.append(given[0].name), write(*given)))
    done = export_checkpoint(checkpoint, companions, target, max_shard_bytes=60_000)
    assert len(written) == len(set(written)) == done.num_files
    assert not export_checkpoint(checkpoint, companions, target, max_shard_bytes=60_000).written


def test_companions_go_along_and_the_config_says_what_is_there(tmp_path: Path) -> None:
    """fp16 of a bf16 model; the source's own quantization is not repeated."""
    checkpoint, source = converted(tmp_path, Case("llama", "fp16"))
    for name, text in (("tokenizer.json", "{}"), ("generation_config.json", "{}"), ("LICENSE", "terms"), ("x.py", "")):
        (source / name).write_text(text)
    done = export_checkpoint(checkpoint, Companions((source,)), tmp_path / "export")
    assert {file.name for file in done.directory.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "LICENSE", "request.json",
        RECORD,
    }  # fmt: skip
    config, before = (json.loads((one / "config.json").read_text()) for one in (done.directory, source))
    assert config == before | {"torch_dtype": "float16"}
    assert done.scheme is None and "TensorRT-LLM >= 1.3" in done.loads_in
    assert json.loads((done.directory / RECORD).read_text())["source"]["model"] == str(source)


def _export(tmp_path: Path, case: Case) -> tuple[RankCheckpoint, Companions]:
    checkpoint, source = converted(tmp_path, case)
    return checkpoint, Companions((source,))


def test_refuses_what_no_engine_computes(tmp_path: Path) -> None:
    checkpoint, companions = _export(tmp_path / "a", Case("mixtral", "int4", changes=WIDE))
    with pytest.raises(Refused, match=r"experts\.0\..*no experts with int4.*compressed-tensors"):
        export_checkpoint(checkpoint, companions, tmp_path / "export", "modelopt")
    checkpoint, companions = _export(tmp_path / "b", Case("llama", "int4", layout=Layout.resolve(4)))
    with pytest.raises(Refused, match=r"groups of 32.*--tp 1"):
        export_checkpoint(checkpoint, companions, tmp_path / "export", "modelopt")
    assert not (tmp_path / "export").exists()


def test_refuses_layers_that_engines_join(tmp_path: Path) -> None:
    _, source_directory = converted(tmp_path, Case("llama", "int8"))
    source = CheckpointSource.open(str(source_directory))
    precision = Precision("int8", "bf16").with_modules({"transformer.layers.1.mlp.gate": LinearForm("bf16")})
    checkpoint = convert(source, tmp_path / "mixed", Layout(), precision)
    with pytest.raises(Refused, match=r"layers\.1\.mlp\.gate_proj is int8.*up_proj is bf16"):
        export_checkpoint(checkpoint, Companions((source.directory,)), tmp_path / "export")


@pytest.mark.parametrize(
    ("name", "scheme", "words"),
    [
        ("w4a16-asym-qwen2", "modelopt", "zero points.*use --scheme compressed-tensors"),
        ("gptq-actorder-llama", "compressed-tensors", "act-order.*itself"),
    ],
)
def test_refuses_what_was_kept_and_has_no_place(name: str, scheme: Any, words: str, tmp_path: Path) -> None:
    directory = tool_made(name)[0]
    checkpoint = keep(directory, tmp_path / "build", Layout())
    with pytest.raises(Refused, match=words):
        export_checkpoint(checkpoint, Companions((directory,)), tmp_path / "export", scheme)


def test_a_damaged_rank_file_is_not_exported(tmp_path: Path) -> None:
    checkpoint, companions = _export(tmp_path, Case("llama", "int8"))
    file = checkpoint.directory / "rank0.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="content differs"):
        export_checkpoint(checkpoint, companions, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_refuses_targets_and_sources_that_are_something_else(tmp_path: Path) -> None:
    checkpoint, companions = _export(tmp_path, Case("llama", "int8"))
    (tmp_path / "mine").mkdir()
    with pytest.raises(Refused, match=r"is no export of ours.*-o"):
        export_checkpoint(checkpoint, companions, tmp_path / "mine")
    config = companions.directories[0] / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e-06'))
    with pytest.raises(Refused, match="norm_epsilon differ"):
        export_checkpoint(checkpoint, companions, tmp_path / "export")
    other = replace(checkpoint, authority=checkpoint.authority | {"dialect": "tensorrt-llm"})
    with pytest.raises(Refused, match=r"dialect of tensorrt-llm; export the model itself"):
        export_checkpoint(other, companions, tmp_path / "export")


def test_another_request_is_refused_and_forced(tmp_path: Path) -> None:
    checkpoint, companions = _export(tmp_path, Case("llama", "fp8"))
    target = tmp_path / "export"
    export_checkpoint(checkpoint, companions, target)
    with pytest.raises(Refused, match="scheme"):
        export_checkpoint(checkpoint, companions, target, "modelopt")
    assert export_checkpoint(checkpoint, companions, target, "modelopt", force=True).written
    assert json.loads((target / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"
