"""`trtbuild verify` from the command line to the record, on engines that are as they should be."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from helpers import TINY_MIXTRAL, TINY_QWEN2

from trtbuild.accuracy import verify as verify_module
from trtbuild.accuracy.verify import VerifyOptions, verify_engine
from trtbuild.cli import main
from trtbuild.engines.passport import PASSPORT, Passport, write_accuracy
from trtbuild.errors import Refused

EVAL = TINY_QWEN2 / "eval.txt"
FAST = ["--num-tokens", "384", "--text", str(EVAL)]


def run_verify(engine: Path, *flags: str) -> Result:
    return CliRunner().invoke(main, ["verify", engine.name, "--workspace", str(engine.parents[1]), *flags])


def test_a_healthy_engine_passes_and_its_passport_says_how_good_it_is(copy_of: Callable[[str], Path]) -> None:
    engine = copy_of("qwen2-bf16")
    before = Passport.open(engine)
    assert before.accuracy_state() == "none"
    assert "its accuracy was never checked; trtbuild verify qwen2-bf16" in str(before.check_accuracy())
    result = run_verify(engine, *FAST, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    passport = Passport.open(engine)
    assert {key: value for key, value in passport.data["accuracy"].items() if key != "engine_digest"} == {
        key: value for key, value in record.items() if key != "engine_digest"
    }
    assert passport.accuracy_state() == "passed"
    assert passport.check_accuracy() is None
    assert {key: value for key, value in passport.data.items() if key != "accuracy"} == {
        key: value for key, value in before.data.items() if key != "accuracy"
    }
    assert (record["executor"], record["tensorrt_has_run"], record["device"]) == ("reference", False, "cpu")
    assert record["source"]["digest"] == passport.data["source"]["digest"]
    [text] = record["texts"]
    assert (text["num_blocks"], text["num_tokens"]) == (3, 384)
    # 16-bit arithmetic is all that there is between them.
    assert abs(text["ppl_increase"]) < 0.005
    assert 0 < text["mean_kl"] < 0.001
    assert 20 < text["source_ppl"] < 60
    assert max(max(block["errors"]) for block in record["blocks"]) < 1e-5
    assert record["long_prompt"]["num_tokens"] == 127
    assert record["long_prompt"]["last_position"] == 127
    assert record["logits"]["rows"] > 500
    assert record["logits"]["not_finite"] == 0
    # Everything that reads an engine still takes it.
    passport.check_files()
    listed = CliRunner().invoke(main, ["list", "--workspace", str(engine.parents[1])]).stdout
    assert f"verified {record['date'][:10]}" in listed
    store = f"file://{engine.parents[1] / 'store'}"
    uploaded = CliRunner().invoke(main, ["upload", engine.name, store, "--workspace", str(engine.parents[1])])
    assert uploaded.exit_code == 0, uploaded.output
    assert json.loads((engine.parents[1] / "store" / engine.name / PASSPORT).read_text())["accuracy"]["passed"]


def test_limits_that_are_not_met_end_with_4_after_the_record(copy_of: Callable[[str], Path], few_steps: None) -> None:
    engine = copy_of("mixtral-int4")
    result = run_verify(engine, *FAST, "--max-ppl-increase", "0.1%", "--min-top1", "0.999", "--max-kl", "0.001")
    assert result.exit_code == 4
    assert "mixtral-int4: FAILED" in result.stdout
    passport = Passport.open(engine)
    failures = passport.data["accuracy"]["failures"]
    assert len(failures) == 4
    for failure in failures:
        assert failure in result.stderr
    assert "an increase of" in failures[0]
    assert "at most 0.1 % is allowed" in failures[0]
    assert passport.accuracy_state() == "failed"
    with pytest.raises(Refused, match=r"mixtral-int4 failed verify on 2.*\n  - text eval.txt: perplexity"):
        passport.check_accuracy()
    # The limits of its precision are wider, and the new record replaces the old.
    assert run_verify(engine, *FAST).exit_code == 0
    assert Passport.open(engine).accuracy_state() == "passed"


def test_a_record_of_other_content_does_not_count(copy_of: Callable[[str], Path], few_steps: None) -> None:
    engine = copy_of("qwen2-bf16")
    passport = verify_engine(engine, VerifyOptions(texts=(EVAL,), num_tokens=256))
    data = passport.data | {"digests": passport.data["digests"] | {"weights": {"rank0.safetensors": "other"}}}
    (engine / PASSPORT).write_text(json.dumps(data))
    changed = Passport.open(engine)
    assert changed.accuracy_state() == "stale"
    assert "of other content" in str(changed.check_accuracy())
    # Nor is one written to an engine that was built again meanwhile.
    with pytest.raises(Refused, match="built again while it was verified"):
        write_accuracy(passport, passport.data["accuracy"])
    assert json.loads((engine / PASSPORT).read_text()) == data


def test_every_expert_is_compared(copy_of: Callable[[str], Path], few_steps: None) -> None:
    record = verify_engine(copy_of("mixtral-fp8"), VerifyOptions(texts=(EVAL,), num_tokens=256)).data["accuracy"]
    experts = [block for block in record["blocks"] if block["block"] == "expert"]
    assert [len(block["errors"]) for block in experts] == [8, 8, 8]
    assert all(0.02 < error < 0.08 for block in experts for error in block["errors"])
    routers = [block for block in record["blocks"] if block["block"] == "router"]
    assert [block["choice"] for block in routers] == [1.0, 1.0, 1.0]
    assert record["precisions"] == ["fp8"]


def test_what_cannot_be_compared_is_refused_before_any_work(
    copy_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_of("qwen2-bf16")

    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(verify_module, "walk_layers", too_late)
    refused = run_verify(engine, "--source", str(TINY_MIXTRAL))
    assert refused.exit_code == 3
    assert "was made from tiny-qwen2 with" in refused.stderr
    assert "--source" in refused.stderr
    (tmp_path / "short.txt").write_text("To be")
    assert run_verify(engine, "--text", str(tmp_path / "short.txt")).exit_code == 1
    (tmp_path / "bad.jsonl").write_text('{"prompt": 1}\nnot JSON\n{"prompt": "a", "exact": "b", "regex": "("}\n')
    bad = run_verify(engine, "--golden", str(tmp_path / "bad.jsonl"))
    assert bad.exit_code == 3
    for part in ("line 1: give exactly one of exact", "line 2: not JSON", "line 3: ", "unterminated subpattern"):
        assert part in bad.stderr
    assert run_verify(engine, "--max-ppl-increase", "two").exit_code == 2
    assert run_verify(engine, "--html", str(tmp_path / "no" / "page.html")).exit_code == 2
    assert run_verify(engine, "--min-top1", "1.5").exit_code == 3
    device = run_verify(engine, "--device", "gpu")
    assert (device.exit_code, "allowed are auto, cpu, cuda and cuda:N" in device.stderr) == (3, True)
    assert run_verify(engine, "--executor", "tensorrt").exit_code == 3
    assert Passport.open(engine).accuracy_state() == "none"


def test_a_source_that_moved_is_found_by_its_digest(
    copy_of: Callable[[str], Path], tmp_path: Path, few_steps: None
) -> None:
    moved = shutil.copytree(TINY_QWEN2, tmp_path / "elsewhere")
    passport = verify_engine(copy_of("qwen2-bf16"), VerifyOptions(source=str(moved), texts=(EVAL,), num_tokens=256))
    assert passport.data["accuracy"]["source"]["model"] == str(moved)
    assert passport.accuracy_state() == "passed"


def test_golden_answers_stand_beside_the_sources(
    copy_of: Callable[[str], Path], tmp_path: Path, few_steps: None
) -> None:
    golden = tmp_path / "golden.jsonl"
    golden.write_text(
        '{"id": "a", "prompt": "ROMEO", "max_tokens": 6, "regex": "."}\n{"prompt": "x", "exact": "never"}\n'
    )
    page = tmp_path / "page.html"
    engine = copy_of("qwen2-bf16")
    result = run_verify(engine, *FAST, "--golden", str(golden), "--html", str(page))
    assert result.exit_code == 0, result.output
    found = Passport.open(engine).data["accuracy"]["golden"]
    assert found["source_ran"]
    assert found["summary"] == {
        "questions": 2, "engine_passed": 1, "source_passed": 1, "both_failed": 1, "gating": 0
    }  # fmt: skip
    first = found["lines"][0]
    # Both compute in bf16; the same weights give the same greedy tokens.
    assert first["engine"] == first["source"] != ""
    assert page.stat().st_size > 1 << 20


def test_an_interrupted_verification_leaves_the_engine_as_it_was(
    copy_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = copy_of("qwen2-bf16")
    before = {file: file.read_bytes() for file in engine.rglob("*.json")}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(verify_module, "check_long_prompt", interrupt)
    assert run_verify(engine, *FAST).exit_code in (1, 130)
    assert {file: file.read_bytes() for file in engine.rglob("*.json")} == before


def test_not_finite_numbers_are_recorded_and_fail(copy_of: Callable[[str], Path], few_steps: None) -> None:
    """NaN is text in the record, since JSON has none, and is over every limit."""
    engine = copy_of("qwen2-bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtbuild.accuracy.distributions.kl_divergence", lambda exact, _: exact[:, 0] * math.nan)
        passport = verify_engine(engine, VerifyOptions(texts=(EVAL,), num_tokens=256))
    record = json.loads((engine / PASSPORT).read_text(), parse_constant=pytest.fail)["accuracy"]
    assert record["texts"][0]["mean_kl"] == "nan"
    assert passport.accuracy_state() == "failed"
    assert any("mean KL divergence nan" in line for line in record["failures"])
