"""`compile --builder tensorrt-llm --dry-run`, kept as files that a person can read.

After a change that is meant: `TRTBUILD_WRITE_GOLDEN=1 python -m pytest tests/engines/tensorrt_llm/test_dry_run.py`, and
read the difference.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from trtbuild.cli import main
from trtbuild.containers import Installed

FILES = Path(__file__).parent / "dry_run"
FAKE = Path(__file__).parents[2] / "fake_tensorrt_llm"
CASES = {
    "mixtral-fp8-tp2": "mixtral --tp 2 --precision fp8",
    "llama-3.3-70b-tp4-pp2": "llama-3.3-70b --tp 4 --pp 2",
    "qwen2-57b-a14b-tp4-ep4": "qwen2-57b-a14b --tp 4 --moe-ep 4",
}


def dry_run(arguments: str) -> Result:
    return CliRunner().invoke(main, ["compile", *shlex.split(arguments), "--builder", "tensorrt-llm", "--dry-run"])


@pytest.mark.parametrize("name", CASES)
def test_golden(name: str) -> None:
    result = dry_run(CASES[name])
    assert result.exit_code == 0, result.output
    file = FILES / f"{name}.txt"
    if os.environ.get("TRTBUILD_WRITE_GOLDEN"):
        file.write_text(result.output, encoding="utf-8")
    assert result.output == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CASES)
def test_trtllm_build_takes_its_flags(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the stand-in's own list of 1.2's flags."""
    monkeypatch.syspath_prepend(str(FAKE))
    from tensorrt_llm.commands.build import parse_arguments  # pyright: ignore[reportMissingImports]

    for module in [module for module in sys.modules if module.startswith("tensorrt_llm")]:
        monkeypatch.delitem(sys.modules, module)
    facts = json.loads(dry_run(CASES[name] + " --json").output)
    assert len(facts["commands"]) == len(facts["checkpoint"]["ranks"])
    for rank, command in enumerate(facts["commands"]):
        assert command[:4] == ["python", "-m", "trtbuild.engines.tensorrt_llm.rank_build", str(rank)]
        parsed = vars(parse_arguments().parse_args(command[4:]))
        assert parsed["output_dir"].endswith(f"rank{rank}.partial")
        assert parsed["multiple_profiles"] == "enable"


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert dry_run("mixtral --tp 2").exit_code == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "mixtral --trtllm max_output_len=100",
            "max_output_len is gone from trtllm-build 1.x; in its place: max_seq_len",
        ),
        ("mixtral --trtllm tokens_per_blok=64", "no flag tokens_per_blok; did you mean tokens_per_block?"),
        ("mixtral --trtllm workers=4", "workers is not for [trtllm]"),
        ("mixtral --trtllm reduce_fusion=enable --tp 2", "for LlamaForCausalLM with --tp above 1 only"),
        ("mixtral --trtllm use_fp8_context_fmha=enable --precision fp8", "needs --precision fp8, --kv-cache fp8"),
        ("mixtral --trtllm context_fmha=disable", "takes use_paged_context_fmha with it"),
        ("mixtral --trtllm opt_num_tokens=64 --trtllm multiple_profiles=enable", "cannot be combined"),
        ("mixtral --trtllm max_num_tokens=16", "it is lifted to tokens_per_block, 32"),
        ("mixtral --trtllm gemm_plugin=yes", "must be auto, float16"),
        ("mixtral --trtllm strip_plan=1", "it is a switch"),
        ("mixtral --trtllm user_buffer=enable", "user_buffer needs reduce_fusion"),
        ("mistral-7b --kv-cache fp8", "--kv-cache fp8 without --precision fp8 takes use_paged_context_fmha away"),
        ("mixtral --precision int8 --target sm100", "sm100: TensorRT-LLM 1.x has no int8"),
        ("mixtral --precision fp8 --target sm86", "sm86 has no fp8"),
        ("mixtral --target ampere", "ampere: must be a compute capability"),
        ("mixtral --tp 3", "--tp 3"),
        ("deepseek-v2-lite", "its latent attention wants an absorbed query projection"),
        ("mixtral --precision int4-awq", "W4A16_AWQ) for experts"),
        ("llama-3.1-8b --precision int4-gptq-asym", "use --precision int4-awq or int4-gptq for a 16-bit checkpoint"),
        ("mixtral --max-seq-len 100000", "--max-seq-len 100000: the model's positions end at 32768"),
        ("mixtral --max-seq-len 128 --max-input-len 128", "leaves no room for an answer"),
    ],
)
def test_mistakes_are_refused_with_the_fix(arguments: str, message: str) -> None:
    result = dry_run(arguments)
    assert result.exit_code == 3, result.output
    assert message in result.output


def test_header_of_a_release_whose_tensorrt_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """NGC's containers may have TensorRT without a wheel of it."""
    monkeypatch.setattr("trtbuild.engines.tensorrt_llm.machine.find_installed", lambda: Installed("1.2.1"))
    lines = dry_run("mixtral").output.splitlines()
    assert lines[1] == "# TensorRT-LLM 1.2.1"


@pytest.mark.parametrize(("precision", "algorithm"), [("int4", "W4A16"), ("int8", "W8A16"), ("fp8", None)])
def test_deferred_quantization_is_told(precision: str, algorithm: str | None) -> None:
    output = dry_run(f"qwen2.5-0.5b --precision {precision}").output
    told = f"its linear layers are bf16: trtllm-build quantizes them ({algorithm})"
    assert (told in output) == ("its linear layers are" in output) == (algorithm is not None), output


def test_smallest_limits_are_taken() -> None:
    """trtllm-build lifts max_num_tokens to a block, and so do we."""
    result = dry_run("mixtral --max-batch-size 1 --max-seq-len 2 --json")
    assert json.loads(result.output)["flags"]["max_num_tokens"] == 32


def test_other_builders_have_plan() -> None:
    result = CliRunner().invoke(main, ["compile", "mixtral", "--dry-run"])
    assert result.exit_code == 2
    assert "trtbuild plan" in result.output
