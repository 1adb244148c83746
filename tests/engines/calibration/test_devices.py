"""`--device`: what it may be, that everything of a layer is put there, and the record of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import TINY_MIXTRAL, hf_config, random_weights, save_checkpoint, some_tokens
from pretend_device import DEVICE, Mixed, PretendDevice, is_on_device
from safetensors.torch import save

from trtbuild.checkpoints.precision import FormatName, LinearForm
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.cli import main
from trtbuild.engines.calibration import devices, layers, prepare, ranges, sensitivity
from trtbuild.engines.calibration.devices import compute_device, devices_of, note_device
from trtbuild.engines.calibration.layer_quantizer import METHODS
from trtbuild.engines.calibration.text import CalibrationText
from trtbuild.errors import Refused

FORMATS: tuple[FormatName, ...] = ("int4", "int8", "fp8-dynamic", "bf16")
TEXT = CalibrationText("eval", (TINY_MIXTRAL / "eval.txt").read_text()[:6000])


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    assert compute_device() == compute_device("auto") == torch.device("cpu")
    pretend_cuda(monkeypatch, 2)
    assert compute_device() == compute_device("auto") == torch.device("cuda")
    assert compute_device("cpu") == torch.device("cpu")
    assert compute_device("cuda:1") == torch.device("cuda", 1)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    for name in ("cuda", "cuda:0"):
        with pytest.raises(Refused, match=f"--device {name}: this torch is built without CUDA; use --device cpu"):
            compute_device(name)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(Refused, match="--device cuda: torch sees no CUDA GPU; use --device cpu"):
        compute_device("cuda")
    pretend_cuda(monkeypatch, 2)
    with pytest.raises(Refused, match="--device cuda:2: torch sees 2 CUDA GPUs, cuda:0 to cuda:1"):
        compute_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cpu:0", "meta", ""])
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(Refused, match="allowed are auto, cpu, cuda and cuda:N"):
        compute_device(name)


@pytest.mark.parametrize("command", ["convert", "compile"])
def test_refused_before_anything_is_written(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cuda(monkeypatch, 0)
    arguments = ["tiny-qwen2", "--precision", "int4-awq", "--device", "cuda", "--workspace", str(tmp_path)]
    result = CliRunner().invoke(main, [command, *arguments])
    assert result.exit_code == 3 and "--device cuda: " in result.output
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["mixtral", "deepseek_v2"])
def source(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CheckpointSource:
    tokens = [some_tokens(64, seed=seed) for seed in range(4)]
    for module in (layers, sensitivity):
        monkeypatch.setattr(module, "calibration_tokens", lambda *_: tokens)
    hf = hf_config(request.param, num_hidden_layers=2)
    return CheckpointSource.open(str(save_checkpoint(tmp_path / "hf", hf, random_weights(hf))))


def test_all_of_a_layer_is_on_the_device(
    source: CheckpointSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation meets tensors of two devices, what is written comes from the CPU, and values are the same."""

    def save_from_cpu(tensors: dict[str, torch.Tensor], **options: dict[str, str]) -> bytes:
        assert not any(map(is_on_device, tensors.values()))
        return save(tensors, **options)

    monkeypatch.setattr(prepare, "save", save_from_cpu)
    monkeypatch.setattr(layers, "save", save_from_cpu)
    names = [linear.global_name for layer in (0, 1) for linear in layers_of(source, layer)]
    mixture = {name: LinearForm(FORMATS[i % 4]) for i, name in enumerate(names)}
    found = {}
    for device in (torch.device("cpu"), DEVICE):
        folder = tmp_path / str(device)
        with PretendDevice() as mode:
            for method, mixed in (("int4-awq", None), ("int4-gptq", mixture)):
                (folder / method).mkdir(parents=True)
                prepare.prepare(
                    source, TEXT, METHODS[method], folder / method, origin=method, mixture=mixed, device=device
                )
            costs = sensitivity.measure(source, dict.fromkeys(FORMATS, source), TEXT, device=device)
            seen = ranges.calibrate(source, TEXT, device=device)
        assert (mode.num_operations > 1000) == (device == DEVICE)
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.glob("*/layer-*.safetensors")}
        found[device] = (files, costs, seen)
    assert len(found[DEVICE][0]) == 4
    assert found[torch.device("cpu")] == found[DEVICE]


def layers_of(source: CheckpointSource, layer: int) -> list:
    return list(layers.layer_weights(source, layer, torch.bfloat16, torch.device("cpu")).plan.linears)


def test_the_pretended_device_finds_what_a_gpu_would() -> None:
    """The test above can fail: a tensor that was forgotten on the CPU, and a result that was not moved back."""
    with PretendDevice():
        there, here = torch.ones(3, device=DEVICE), torch.ones(3)
        assert there.device == DEVICE and is_on_device(there[None].T + 1) and not is_on_device(there.cpu())
        assert is_on_device(here.to(DEVICE) * there) and is_on_device(there[torch.tensor([0])])
        for mix in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.mul_(there)):
            with pytest.raises(Mixed):
                mix()


def test_the_record_says_what_computed_and_identifies_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that a GPU began and a CPU ended names both; what is there serves any device."""
    arguments = [
        "tiny-qwen2",
        "--precision",
        "int4-gptq",
        "--device",
        "cpu",
        "--name",
        "x",
        "--workspace",
        str(tmp_path),
    ]
    assert CliRunner().invoke(main, ["convert", *arguments]).exit_code == 0
    cpu = {"device": "cpu", "name": None, "torch": torch.__version__}
    assert json.loads((tmp_path / "build" / "x" / "trtbuild.json").read_text())["calibrated_on"] == [cpu]
    [folder] = (tmp_path / "build" / ".calibration").glob("[!.]*")
    assert devices_of(folder) == [cpu]
    monkeypatch.setattr(devices, "_model", lambda device: "Some GPU" if device.type == "cuda" else None)
    note_device(folder, torch.device("cuda", 1))
    note_device(folder, torch.device("cuda", 1))
    gpu = {"device": "cuda", "name": "Some GPU", "torch": torch.__version__}
    assert devices_of(folder) == [cpu, gpu]
    pretend_cuda(monkeypatch, 2)
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("calibrated again"))
    arguments[arguments.index("cpu")], arguments[arguments.index("x")] = "cuda:1", "y"
    result = CliRunner().invoke(main, ["convert", *arguments])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "build" / "y" / "trtbuild.json").read_text())["calibrated_on"] == [cpu, gpu]
