"""The figures of a comparison, against sums that are written out here."""

from __future__ import annotations

import math
from importlib import resources

import pytest
import torch
from helpers import TINY_MIXTRAL, TINY_QWEN2, executor_of

from trtbuild.accuracy.distributions import Divergence, compare_text, kl_divergence, prefill_logits
from trtbuild.accuracy.text_blocks import EvaluationText, TextBlocks, cut_text
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.calibration.text import TextTokens
from trtbuild.errors import CheckpointError


def blocks_of(*blocks: list[int]) -> TextBlocks:
    return TextBlocks(EvaluationText("text", "abc"), TextTokens([], blocks[0]), list(blocks))


def test_kl_divergence_and_perplexity_of_known_distributions() -> None:
    exact, found = torch.tensor([[0.5, 0.25, 0.25]] * 3), torch.tensor([[0.25, 0.5, 0.25]] * 3)
    assert kl_divergence(exact.log(), found.log())[0] == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    divergence = Divergence()
    divergence.add(exact.log(), found.log(), [2, 0, 1])
    divergence.add(exact.log(), exact.log(), [2, 0, 0])
    result = divergence.result(blocks_of([2, 0, 1], [2, 0, 0]))
    # Block 1: tokens 0 and 1 cost the source log 2 and log 4, the engine log 4 and log 2. Block 2: log 2 twice.
    assert result.source_ppl == pytest.approx(math.exp((1.5 * math.log(2) + math.log(2)) / 2))
    assert result.ppl_increase == pytest.approx(0)
    assert result.mean_kl == pytest.approx(0.125 * math.log(2))
    assert result.max_kl == pytest.approx(0.25 * math.log(2))
    assert result.top1 == 0.5
    assert (result.num_blocks, result.num_tokens) == (2, 6)


def test_the_standard_error_is_of_paired_differences() -> None:
    """Blocks as different as can be, and an engine that always loses a tenth of a nat, but for one block in four."""
    divergence = Divergence()
    divergence.source_nll, divergence.engine_nll = [1.0, 5.0, 2.0, 9.0], [1.1, 5.1, 2.1, 9.5]
    divergence.kl, divergence.agree = [torch.zeros(4)], [torch.ones(4)]
    result = divergence.result(blocks_of([1, 2]))
    differences = [0.1, 0.1, 0.1, 0.5]
    mean = sum(differences) / 4
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 3)
    assert result.ppl_increase == pytest.approx(math.exp(mean) - 1)
    assert result.ppl_increase_se == pytest.approx(math.exp(mean) * deviation / 2)
    assert result.source_ppl == pytest.approx(math.exp(17 / 4))


def test_a_text_through_chunks_is_the_text_in_one_piece() -> None:
    """Against itself a model loses nothing, whatever its chunks."""
    source = CheckpointSource.open(str(TINY_QWEN2))
    text = cut_text(EvaluationText.open(TINY_QWEN2 / "eval.txt"), load_tokenizer(TINY_QWEN2), 256, 64)
    whole = executor_of(source, chunk_size=64)
    logits = [prefill_logits(whole, 0, block) for block in text.blocks]
    result = compare_text(executor_of(source, chunk_size=24), text, logits.__getitem__, lambda: None)
    assert abs(result.ppl_increase) < 1e-5
    assert result.max_kl < 1e-6
    assert result.top1 == 1
    assert result.num_tokens == 256
    following = torch.tensor(text.blocks[0][1:])
    nll = torch.nn.functional.cross_entropy(logits[0][:-1], following)
    assert 1 < float(nll) < 6


def test_blocks_are_spread_over_the_text_and_begin_as_a_text_begins() -> None:
    tokenizer = load_tokenizer(TINY_MIXTRAL)
    text = cut_text(EvaluationText.open(TINY_MIXTRAL / "eval.txt"), tokenizer, 1000, 128)
    prefix, plain = text.tokens.prefix, text.tokens.plain
    assert len(prefix) == 1
    assert [len(block) for block in text.blocks] == [128] * 7
    assert all(block[: len(prefix)] == prefix for block in text.blocks)
    body = 128 - len(prefix)
    assert text.blocks[0][len(prefix) :] == plain[:body]
    assert text.blocks[-1][len(prefix) :] == plain[-body:]
    # Longer than the text: it begins again.
    repeated = text.repeated(len(plain) + 50)
    assert len(repeated) == len(plain) + 50
    assert repeated[-30:] == plain[20 - len(prefix) : 50 - len(prefix)]
    with pytest.raises(CheckpointError, match="it takes 16"):
        cut_text(EvaluationText("short", "To be"), tokenizer, 1000, 128)


def test_the_bundled_text_is_held_out() -> None:
    """No line of it is in the calibration text, and it is more than a whole default run asks for."""
    calibration = resources.files("trtbuild.data").joinpath("calibration.txt").read_text("utf-8")
    lines = {line.strip() for line in calibration.splitlines()}
    text = EvaluationText.open(None)
    assert text.name == "bundled"
    shared = [line for line in text.text.splitlines() if len(line.strip()) > 20 and line.strip() in lines]
    assert shared == []
    assert 18_000 < len(text.text.encode()) < 30_000
