"""The source layer by layer is the source, and an engine's blocks are summed over its ranks as they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import MOE_FAMILIES, TINY_QWEN2, executor_of, make_checkpoint, prefill_all, some_tokens

from trtbuild.accuracy.gate import Limits, block_limit, find_failures, parse_part
from trtbuild.accuracy.layer_errors import group_errors, relative_error, walk_layers
from trtbuild.accuracy.models import EngineModel, SourceModel, source_executor, source_executor_bytes
from trtbuild.checkpoints.convert import convert
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision, PrecisionName
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.errors import Refused

CPU = torch.device("cpu")


def converted(tmp_path: Path, source: CheckpointSource, layout: Layout, precision: PrecisionName) -> RankCheckpoint:
    wanted = Precision.resolve(precision, source.config.dtype)
    return convert(source, tmp_path / "build", layout, wanted, workers=1)


@pytest.mark.parametrize("family", ["llama", *MOE_FAMILIES])
def test_the_source_is_itself_and_a_16_bit_engine_is_the_source(tmp_path: Path, family: str) -> None:
    """Logits equal the executor's (which equal transformers', see engines/reference); in ranks, stages, any block."""
    source = CheckpointSource.open(str(make_checkpoint(tmp_path / "model", family)))
    layout = Layout(tp=2, pp=2, moe_tp=1, moe_ep=2) if source.config.moe else Layout(tp=2, pp=2)
    checkpoint = converted(tmp_path, source, layout, "bf16")
    sequences = [some_tokens(n, seed=n) for n in (40, 40, 17, 90)]
    model = SourceModel(source, 128, CPU)
    final, errors = walk_layers(model, EngineModel(checkpoint, 128, CPU), sequences)
    executor = executor_of(source)
    for tokens, hidden in zip(sequences, final, strict=True):
        torch.testing.assert_close(
            model.logits(hidden), prefill_all(executor, tokens, (len(tokens) // 2,)), rtol=0, atol=1e-4
        )
    assert max(error.error for error in errors) < 1e-5
    config = source.config
    blocks = {(error.layer, error.block, error.expert) for error in errors}
    for layer in range(config.num_layers):
        assert {(layer, "attention", None), (layer, "mlp", None)} <= blocks
        moe = config.moe if config.is_moe(layer) else None
        experts = {(layer, "expert", e) for e in range(moe.num_experts)} if moe else set()
        assert {found for found in blocks if found[:2] == (layer, "expert")} == experts
        assert ((layer, "shared_expert", None) in blocks) == bool(moe and moe.shared_intermediate_size)
        assert ((layer, "router", None) in blocks) == bool(moe)


def test_long_sequences_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = CheckpointSource.open(str(TINY_QWEN2))
    tokens = some_tokens(100, 1024)
    whole = SourceModel(source, 128, CPU)
    hidden = whole.embed([tokens])
    expected = whole.layer(0).run(hidden)
    monkeypatch.setattr("trtbuild.accuracy.models.CHUNK_TOKENS", 24)
    torch.testing.assert_close(SourceModel(source, 128, CPU).layer(0).run(hidden), expected, rtol=1e-5, atol=1e-5)


def test_rounded_blocks_lose_what_the_yardstick_says(tmp_path: Path) -> None:
    source = CheckpointSource.open(str(TINY_QWEN2))
    checkpoint = converted(tmp_path, source, Layout(tp=2), "int4")
    tokens = [some_tokens(64, 1024, seed) for seed in range(3)]
    _, errors = walk_layers(SourceModel(source, 128, CPU), EngineModel(checkpoint, 128, CPU), tokens)
    found = [error for error in errors if error.precision == "int4"]
    assert len(found) == 2 * source.config.num_layers
    for error in found:
        assert 0.05 < error.error < 0.3
        assert error.error == pytest.approx(error.rounding, rel=0.02)
        assert error.limit == pytest.approx(1.3 * error.rounding)
    plain = [error for error in errors if error.precision == "bf16"]
    assert {error.block for error in plain} == {"embed", "head"}
    assert all(error.error < 1e-5 and error.limit == 0.01 for error in plain)


def test_relative_error_is_blind_to_neither_few_nor_most_tokens() -> None:
    exact = torch.ones(10, 4)
    assert relative_error(exact * 1.1, exact) == pytest.approx(0.1)
    huge = exact.clone()
    huge[0] = 1e4
    # All but the huge token are wrong by half: the sum over all would say 0.00015.
    wrong = torch.cat([huge[:1], huge[1:] * 1.5])
    assert relative_error(wrong, huge) == pytest.approx(0.5)
    # One token in ten is wrong: the median would say 0.
    wrong = exact.clone()
    wrong[3] *= 2
    assert relative_error(wrong, exact) == pytest.approx(0.1**0.5)
    assert relative_error(exact * 0, exact * 0) == 0
    assert relative_error(exact, exact * 0) == float("inf")
    wrong[5, 0] = float("nan")
    assert not relative_error(wrong, exact) <= 1e9


def test_the_source_executor_takes_what_was_forecast(tmp_path: Path) -> None:
    source = CheckpointSource.open(str(TINY_QWEN2))
    limits = EngineLimits(max_batch_size=8, max_seq_len=64, chunk_size=32)
    executor = source_executor(source, limits, CPU)
    assert (executor.num_slots, executor.dtype) == (4, torch.bfloat16)
    held = {id(t): t.nbytes for stage in executor._stages for w in stage.weights for t in w.plain.values()}
    held |= {id(x.weight): x.weight.nbytes for s in executor._stages for w in s.weights for x in w.linears.values()}
    held |= {id(cache): cache.nbytes for s in executor._stages for rank in s.caches for cache in rank.values()}
    # Norms are held in float32.
    assert sum(held.values()) == pytest.approx(source_executor_bytes(source, limits), rel=0.01)


def test_limits_follow_the_loosest_precision_and_the_flags() -> None:
    assert Limits.for_engine({"bf16", "int8"}).max_ppl_increase == 0.02
    assert Limits.for_engine({"bf16", "int4", "fp8"}).min_top1 == Limits.for_engine({"int4"}).min_top1
    # A calibration loses less than rounding does, and is held to that; formats looser than its int4 there are none.
    rounded, calibrated = Limits.for_engine({"int4"}), Limits.for_engine({"int4", "int8"}, calibrated=True)
    assert calibrated.max_kl < rounded.max_kl
    assert calibrated.min_top1 > rounded.min_top1
    assert Limits.for_engine({"int8"}, calibrated=True) == Limits.for_engine({"int8"})
    given = Limits.for_engine({"int4"}, max_ppl_increase=0.02, max_kl=0.0)
    assert (given.max_ppl_increase, given.max_kl) == (0.02, 0.0)
    assert [parse_part(text) for text in ("2%", "0.02", " 2.5 %", "0")] == [0.02, 0.02, 0.025, 0]
    for bad in ("", "-1%", "two", "1e3", "2%%"):
        with pytest.raises(ValueError, match="use a part such as"):
            parse_part(bad)
    with pytest.raises(Refused, match="--min-top1 2"):
        Limits.for_engine({"int4"}, min_top1=2)
    assert (block_limit(0.0), block_limit(0.2)) == (0.01, pytest.approx(0.26))


def test_a_format_that_loses_too_much_everywhere_fails_though_its_yardstick_does_too() -> None:
    """The yardstick shares the quantizer's code: a quantizer gone wrong is seen in the median."""
    blocks = [{"layer": i, "block": "mlp", "precision": "int8", "errors": [0.2], "limits": [0.26]} for i in range(3)]
    record = {
        "limits": Limits.for_engine({"int8"}).to_dict(), "config": {"sliding_window": (None, 64)}, "texts": [],
        "blocks": blocks, "invariance": {"failures": []}, "logits": {"rows": 1, "not_finite": 1}, "golden": None,
        "long_prompt": {"mean_kl": 0.0, "num_tokens": 1, "num_compared": 1},
    }  # fmt: skip
    assert find_failures(record) == [
        "config: sliding_window is None, the source has 64",
        "mlp (int8): the median of 3 relative errors is 0.2, more than the format loses (0.04)",
        "1 of 1 rows of logits are not finite",
    ]
    assert group_errors([]) == []
