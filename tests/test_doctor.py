"""What `trtbuild doctor` says of running engines on machines of every kind."""

from __future__ import annotations

import pytest
import torch

from trtbuild import doctor
from trtbuild.errors import Refused

CASES: dict[str, tuple[list[tuple[int, int]], str | None, str, str]] = {
    "no GPU": ([], "1.7.1", "ok", "by the reference executor (PyTorch): torch sees no CUDA GPU"),
    "H100": ([(9, 0)], "1.7.1", "ok", "reference executor (PyTorch): TensorRT-RTX has no target sm90, only sm75"),
    "no library": ([(8, 9)], None, "info", "reference executor (PyTorch); TensorRT-RTX would run the plans"),
    "one GPU": ([(8, 9)], "1.7.1", "ok", "by the TensorRT executor on sm89"),
    "two GPUs": ([(12, 0), (12, 0)], "1.7.1", "ok", "on sm120, sm120, up to 2 tensor-parallel ranks"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_runs_engines_here(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities, library, status, detail = CASES[case]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    monkeypatch.setattr(doctor, "_installed", lambda name: library)
    finding = doctor._run_engines()
    assert (finding.subject, finding.status) == ("run", status)
    assert detail in finding.detail
    assert ("pip install" in finding.fix) == (case == "no library")


def test_triton_that_is_missing_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Refused("no Triton server: none on PATH. On Linux: a long command")

    monkeypatch.setattr("trtbuild.triton_repo.installation.find_triton", refuse)
    finding = doctor._triton()
    assert (finding.status, finding.detail) == ("missing", "trtbuild serve cannot run (no Triton server: none on PATH)")
    assert "pip install --no-deps nvidia-pytriton" in finding.fix


@pytest.mark.parametrize(
    ("message", "fix"),
    [("no perf_analyzer: none", "tritonclient=="), ("perf_analyzer does not run here:\n  - x: y", "")],
)
def test_perf_analyzer_is_examined_and_not_only_found(message: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise Refused(message)

    monkeypatch.setattr("trtbuild.perf.perf_analyzer_binary.find_perf_analyzer", refuse)
    finding = doctor._perf_analyzer()
    assert finding.status == "info" and message in finding.detail
    assert fix in finding.fix and bool(fix) == bool(finding.fix)
