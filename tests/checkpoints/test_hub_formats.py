"""Quantized checkpoints as real tools make them, and as their formats are described: the values that we read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_packing import (
    TOOL_MADE,
    TOOLS,
    Codes,
    gptq_checkpoint,
    pack_awq,
    pack_compressed,
    pack_gptq,
    quantize_checkpoint,
    random_codes,
    read_codes,
    sha256,
    tool_made,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtbuild.checkpoints.content import source_digest
from trtbuild.checkpoints.hub_formats import weights as weights_module
from trtbuild.checkpoints.hub_formats.modules import StoredModule
from trtbuild.checkpoints.hub_formats.scheme import PackingName, Scheme
from trtbuild.checkpoints.hub_formats.weights import ModuleReader
from trtbuild.checkpoints.lora import LoraAdapter
from trtbuild.checkpoints.safetensors_file import MappedTensors, read_header
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.errors import CheckpointError, Refused

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "GEMM"}


def own_name(source: CheckpointSource, name: str) -> str:
    return next(canonical for canonical, own in source._names.items() if own == name)


@pytest.mark.parametrize("name", TOOLS)
def test_weights_are_those_that_the_tool_dequantizes(name: str) -> None:
    directory, _, _, expected = tool_made(name)
    source = CheckpointSource.open(str(directory))
    assert len(expected) >= 7
    for canonical, weight in source._names.items():
        stored = source.stored(canonical)
        assert (stored is not None) == (weight in expected), weight
        if stored is None:
            continue
        found = source.tensor(canonical)
        assert sha256(found) == expected[weight], weight
        assert source.shape(canonical) == tuple(found.shape)
        half = len(found) // 2
        assert torch.equal(source.rows(canonical, half, half + 3), found[half : half + 3])


@pytest.mark.parametrize("name", [name for name in TOOLS if not name.startswith("fp8")])
def test_codes_are_those_in_the_files(name: str) -> None:
    directory, options, tensors, expected = tool_made(name)
    source = CheckpointSource.open(str(directory))
    for weight in expected:
        canonical = own_name(source, weight)
        stored, rows = source.stored(canonical), source.shape(canonical)[0]
        assert stored is not None
        found = source.stored_rows(canonical, 0, rows)
        codes, zeros = read_codes(tensors, weight.removesuffix(".weight"), options)
        order = torch.arange(codes.shape[1]) if stored.order is None else stored.order
        assert found.values.dtype == torch.int8
        assert np.array_equal(found.values.numpy(), codes[:, order.numpy()])
        assert stored.form.zeros == bool(zeros.any())
        if found.zeros is not None:
            assert np.array_equal(found.zeros.numpy(), zeros)


def test_the_tools_checkpoints_have_what_is_hard_to_read() -> None:
    """Act-order, zero points at the end of their range, weights left alone: the tests above would pass without."""
    source = CheckpointSource.open(str(TOOL_MADE / "gptq-actorder-llama"))
    facts = source.stored("layers.0.down")
    assert facts is not None
    assert facts.order is not None
    assert sorted(facts.order.tolist()) == list(range(64))
    assert facts.order.tolist() != list(range(64))
    # GPTQModel's first format borrows: a stored nibble of 15 stands for a zero point of 0.
    packed = load_file(TOOL_MADE / "gptqmodel-v1-llama" / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
    assert any((int(word) >> shift) & 15 == 15 for word in packed.flatten() for shift in range(0, 32, 4))
    source = CheckpointSource.open(str(TOOL_MADE / "w4a16-llama"))
    assert source.stored("layers.0.gate") is not None
    assert source.stored("layers.1.gate") is None


def test_experts_under_either_name_are_the_same(tmp_path: Path) -> None:
    """llm-compressor writes gate_proj, up_proj and down_proj where the hub has w1, w3 and w2; never a mixture."""
    directory, options, tensors, expected = tool_made("w4a16-mixtral")
    assert "model.layers.0.block_sparse_moe.experts.1.gate_proj.weight" in expected
    theirs = CheckpointSource.open(str(directory))
    hub = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

    def renamed(*parts: str) -> CheckpointSource:
        target = tmp_path / "-".join(parts)
        target.mkdir()
        names = {name: name for name in tensors}
        for part in parts:
            names |= {k: v.replace(part, hub[part]) for k, v in names.items() if ".experts." in v}
        save_file({names[name]: tensor for name, tensor in tensors.items()}, target / "model.safetensors")
        (target / "config.json").write_bytes((directory / "config.json").read_bytes())
        return CheckpointSource.open(str(target))

    ours = renamed(*hub)
    for canonical in ours._names:
        assert torch.equal(ours.tensor(canonical), theirs.tensor(canonical)), canonical
    assert not torch.equal(ours.tensor("layers.0.experts.0.gate"), ours.tensor("layers.0.experts.0.up"))
    codes, _ = read_codes(tensors, "model.layers.0.block_sparse_moe.experts.1.up_proj", options)
    assert np.array_equal(theirs.stored_rows("layers.0.experts.1.up", 0, 64).values.numpy(), codes)
    with pytest.raises(CheckpointError, match=r"experts\.0\.\w+'? is missing|experts\.0\.\S+ has no place"):
        renamed("gate_proj", "up_proj")


def test_fp8_has_its_scales_and_ranges() -> None:
    directory, _, tensors, _ = tool_made("fp8-mixtral")
    source = CheckpointSource.open(str(directory))
    module = "model.layers.0.block_sparse_moe.experts.1.w2"
    stored, rows = source.stored("layers.0.experts.1.down"), source.stored_rows("layers.0.experts.1.down", 3, 9)
    assert stored is not None
    assert stored.form.format == "fp8"
    assert stored.activation_scale == float(tensors[f"{module}.input_scale"])
    assert rows.scales.tolist() == [float(tensors[f"{module}.weight_scale"])]
    assert torch.equal(rows.values.view(torch.uint8), tensors[f"{module}.weight"][3:9].view(torch.uint8))
    directory, _, tensors, _ = tool_made("fp8-dynamic-llama")
    source = CheckpointSource.open(str(directory))
    stored, rows = source.stored("layers.0.o"), source.stored_rows("layers.0.o", 3, 9)
    assert stored is not None
    assert (stored.form.format, stored.activation_scale) == ("fp8-dynamic", None)
    assert rows.scales.tolist() == tensors["model.layers.0.self_attn.o_proj.weight_scale"][3:9, 0].float().tolist()


PACKERS: dict[str, tuple[PackingName, Callable[..., dict[str, torch.Tensor]], int]] = {
    "awq": ("awq", pack_awq, 0),
    "gptq": ("gptq", pack_gptq, 1),
    "gptq_v2": ("gptq", lambda name, weight, bits: pack_gptq(name, weight, bits, offset=0), 0),
    "packed": ("packed", pack_compressed, 0),
}


def reader_of(directory: Path, kind: str, weight: Codes, bits: int, group: int) -> tuple[ModuleReader, StoredModule]:
    packing, pack, offset = PACKERS[kind]
    tensors = pack("m", weight, bits)
    save_file(tensors, directory / "m.safetensors")
    roles = frozenset(name.removeprefix("m.") for name in tensors)
    scheme = Scheme(packing, kind, bits, group, symmetric=False, zero_offset=offset)
    shape = (weight.codes.shape[0], weight.codes.shape[1])
    mapped = MappedTensors(read_header(directory / "m.safetensors"))
    return ModuleReader(mapped, torch.float16), StoredModule("m", shape, scheme, roles)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(PACKERS)), st.integers(1, 5), st.integers(1, 4), st.sampled_from([16, 32]), st.booleans(),
    st.booleans(), st.integers(0, 2**31), st.data(),
)  # fmt: skip
def test_what_is_packed_is_read(
    tmp_path_factory: pytest.TempPathFactory, kind: str, eights: int, groups: int, group: int, zeros: bool,
    has_order: bool, seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    has_order = has_order and kind != "awq"
    weight = random_codes((8 * eights, group * groups), group, seed, zeros=zeros, order=has_order)
    reader, module = reader_of(tmp_path_factory.mktemp("m"), kind, weight, 4, group)
    start = data.draw(st.integers(0, 8 * eights - 1))
    stop = data.draw(st.integers(start + 1, 8 * eights))
    stored, found = reader.stored(module), reader.stored_rows(module, start, stop)
    order = np.argsort(weight.groups, kind="stable")
    assert stored.form.order == bool((order != np.arange(len(order))).any())
    assert np.array_equal(found.values.numpy(), weight.codes[start:stop, order] - 8)
    assert torch.equal(found.scales, weight.scales[start:stop])
    assert stored.form.zeros == bool((weight.zeros != 8).any())
    if found.zeros is not None:
        assert np.array_equal(found.zeros.numpy(), weight.zeros[start:stop] - 8)
    assert torch.equal(reader.rows(module, start, stop), weight.dequantized()[start:stop].half())


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "packed"])
def test_eight_bits_in_whole_rows_are_read(kind: str, tmp_path: Path) -> None:
    weight = random_codes((24, 64), 64, 5, bits=8, zeros=False)
    reader, module = reader_of(tmp_path, kind, weight, 8, 64)
    found = reader.stored_rows(module, 5, 19)
    assert reader.stored(module).form.format == "int8"
    assert np.array_equal(found.values.numpy(), weight.codes[5:19] - 128)
    assert torch.equal(found.scales, weight.scales[5:19, 0])


def test_bands_give_the_same_rows_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_codes((200, 64), 16, 6)
    monkeypatch.setattr(weights_module, "_BAND_ELEMENTS", 64 * 40)
    for kind in ("awq", "gptq"):
        reader, module = reader_of(tmp_path, kind, weight, 4, 16)
        for start, stop in ((0, 7), (7, 31), (30, 33), (150, 200), (3, 190), (64, 65), (199, 200)):
            found = reader.stored_rows(module, start, stop)
            assert np.array_equal(found.values.numpy(), weight.codes[start:stop] - 8)
            assert found.zeros is not None
            assert np.array_equal(found.zeros.numpy(), weight.zeros[start:stop] - 8)


def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    weight = random_codes((256, 64), 16, 7)
    reader, module = reader_of(tmp_path, "gptq", weight, 4, 16)

    def read(start: int) -> bool:
        found = reader.stored_rows(module, start, start + 8).values.numpy()
        return np.array_equal(found, weight.codes[start : start + 8] - 8)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, [start % 248 for start in range(0, 8000, 41)]))


def test_the_digest_is_over_all_tensors_of_a_weight(tmp_path: Path) -> None:
    gptq_checkpoint(tmp_path)
    before = {name: source_digest(CheckpointSource.open(str(tmp_path)), name) for name in ("layers.0.q", "layers.0.k")}
    tensors = load_file(tmp_path / "model.safetensors")
    for role in ("qweight", "qzeros", "scales"):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        part = changed[f"model.layers.0.self_attn.q_proj.{role}"]
        part[0, 0] = part[0, 1] if part[0, 0] != part[0, 1] else part[0, 2]
        save_file(changed, tmp_path / "model.safetensors")
        source = CheckpointSource.open(str(tmp_path))
        assert source_digest(source, "layers.0.q") != before["layers.0.q"], role
        assert source_digest(source, "layers.0.k") == before["layers.0.k"], role


def test_scales_that_are_rounded_are_said_to_be(tmp_path: Path) -> None:
    gptq_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    stored = CheckpointSource.open(str(tmp_path)).stored("layers.0.q")
    assert stored is not None
    assert stored.origin == "GPTQ, F16 scales rounded to bfloat16"


def test_an_adapter_onto_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    adapter = LoraAdapter(tmp_path, 1.0, {})
    source = CheckpointSource.open(str(TOOL_MADE / "awq-mixtral"))
    with pytest.raises(Refused, match=r"is quantized, .*merge the adapter into the 16-bit model"):
        source.with_lora([adapter])


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_every_family_can_come_quantized(kind: str, tmp_path: Path) -> None:
    options = {**AWQ, "modules_to_not_convert": ["gate"]}
    made = quantize_checkpoint(
        tmp_path, options, pack_awq, lambda shape, name: random_codes(shape, 16, len(name)), kind,
        # 8 outputs fill a word; DeepSeek's latent projections are not as wide.
        keep=lambda name: "kv_a_proj" in name or "q_b_proj" in name,
    )  # fmt: skip
    source = CheckpointSource.open(str(tmp_path))
    found = {source._names[name].removesuffix(".weight"): name for name in source._names if source.stored(name)}
    assert found.keys() == made.keys()
    for module, canonical in found.items():
        assert torch.equal(source.tensor(canonical), made[module].dequantized().half()), module
