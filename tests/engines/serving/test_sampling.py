"""Sampling against transformers' logits processors, and the promise that rows do not see each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtbuild.engines.serving.request import SamplingParams
from trtbuild.engines.serving.sampling import SamplerState, adjust, draw, sample, token_logprobs, uniform, warp
from trtbuild.errors import Refused

VOCAB = 97
CPU = torch.device("cpu")
# Of the release that introduced them: changing the hash would change every seeded answer.
UNIFORMS = [0.010341, 0.872814, 0.336525, 0.614666]


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def state(
    prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), stop_ids: tuple[int, ...] = (), **params: object
) -> SamplerState:
    made = SamplerState(SamplingParams(**params), prompt, VOCAB, CPU, stop_ids)  # type: ignore[arg-type]
    for token in output:
        made.accept(token)
    return made


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.4])
def test_warp_is_transformers_chain(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    logits = logits_of(8)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    chain += [TopKLogitsWarper(top_k)] if top_k else []
    chain += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    chain += [MinPLogitsWarper(min_p)] if min_p else []
    unread: Any = torch.zeros(8, 1, dtype=torch.long)
    expected = chain(unread, logits.clone()).softmax(-1)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = warp(logits, [params] * 8).softmax(-1)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", [1, 2, 10, 96])
def test_cut_beyond_the_head_is_the_same_cut(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = logits_of(5)
    params = [
        SamplingParams(temperature=1.0, top_k=9),
        SamplingParams(temperature=3.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=60, top_p=0.99),
        SamplingParams(temperature=1.0, top_p=0.01),
        SamplingParams(temperature=1.0, top_k=200),
    ]
    whole = warp(logits, params)
    counts = torch.isfinite(whole).sum(-1).tolist()
    assert (counts[0], counts[3], counts[4]) == (9, 1, VOCAB) and 10 < counts[2] < counts[1] < 96
    monkeypatch.setattr("trtbuild.engines.serving.sampling.HEAD", head)
    assert torch.equal(torch.isfinite(warp(logits, params)), torch.isfinite(whole))


def test_warp_of_mixed_rows_is_each_row_alone() -> None:
    logits = logits_of(4)
    params = [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.5, top_k=3),
        SamplingParams(temperature=2.0, top_p=0.5),
        SamplingParams(temperature=1.0, min_p=0.2, top_k=9),
    ]
    mixed = warp(logits, params)
    for row in range(4):
        assert torch.equal(mixed[row], warp(logits[row : row + 1], params[row : row + 1])[0])
    assert [int(torch.isfinite(r).sum()) for r in mixed][:2] == [VOCAB, 3]


def test_top_k_keeps_ties_and_small_temperature_does_not_overflow() -> None:
    logits = torch.tensor([[5.0, 4.0, 4.0, 4.0, 1.0]])
    assert torch.isfinite(warp(logits, [SamplingParams(temperature=1.0, top_k=2)])).tolist() == [[True] * 4 + [False]]
    sharp = warp(logits * 1e30, [SamplingParams(temperature=1e-4, top_p=0.9)]).softmax(-1)
    assert sharp.tolist() == [[1, 0, 0, 0, 0]]


def test_repetition_penalty_is_transformers_over_prompt_and_output() -> None:
    logits = logits_of(2, seed=4)
    history: Any = torch.tensor([[1, 2, 3, 50, 50, 7]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(history, logits[:1].clone())
    found = adjust(logits, [state((1, 2, 3), (50, 50, 7), repetition_penalty=1.7), state()])
    torch.testing.assert_close(found[:1], expected)
    assert torch.equal(found[1], logits[1])
    assert not torch.equal(found[0], logits[0])


def test_presence_and_frequency_count_output_only() -> None:
    logits = logits_of(1)
    found = adjust(logits, [state((1, 2, 3), (50, 50, 7), presence_penalty=0.5, frequency_penalty=0.25)])
    expected = logits.clone()
    expected[0, 50] -= 0.5 + 2 * 0.25
    expected[0, 7] -= 0.5 + 0.25
    torch.testing.assert_close(found, expected)


def test_min_tokens_forbids_stop_ids_until_reached() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 4] = 10, 5
    held = state(stop_ids=(9,), min_tokens=2)
    tokens = []
    for _ in range(3):
        token = sample(logits, [held])[0].token_id
        assert token is not None
        held.accept(token)
        tokens.append(token)
    assert tokens == [4, 4, 9]


def test_logprobs_are_the_models_own() -> None:
    logits = logits_of(3, seed=2)
    kept = logits.clone()
    reference = logits.log_softmax(-1)
    states = [state(logprobs=5, temperature=0.7, top_k=2, repetition_penalty=1.5, seed=1), state(), state(logprobs=0)]
    samples = sample(logits, states)
    assert torch.equal(logits, kept)
    first = samples[0]
    assert first.token_id is not None and first.logprob == pytest.approx(float(reference[0, first.token_id]), abs=1e-5)
    top = reference[0].topk(5)
    assert [token for token, _ in first.top_logprobs] == top.indices.tolist()
    assert [value for _, value in first.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-5)
    assert (samples[1].logprob, samples[1].top_logprobs) == (None, ())
    assert samples[2].logprob == pytest.approx(float(reference[2].max()), abs=1e-5) and samples[2].top_logprobs == ()
    assert token_logprobs(logits, [3, 4, 5]) == pytest.approx([float(reference[i, i + 3]) for i in range(3)], abs=1e-5)


@settings(deadline=None, max_examples=60)
@given(order=st.permutations(range(6)), keep=st.integers(1, 6), step=st.integers(0, 50))
def test_batch_mates_change_nothing(order: list[int], keep: int, step: int) -> None:
    logits = logits_of(6, seed=step)
    variants = [
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 0.8, "top_p": 0.7},
        {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 1.0, "presence_penalty": 1.0, "logprobs": 3},
    ]

    def made(row: int) -> SamplerState:
        return state(output=tuple(range(step)), seed=row * 11, **variants[row])

    alone = {row: sample(logits[row : row + 1], [made(row)])[0] for row in range(6)}
    batch = order[:keep]
    assert sample(logits[batch], [made(row) for row in batch]) == [alone[row] for row in batch]


def test_draws_follow_the_distribution_and_differ_by_seed_and_step() -> None:
    scores = torch.tensor([[math.log(0.5), math.log(0.3), float("-inf"), math.log(0.2)]])
    draws = draw(scores.expand(20000, -1), [uniform(7, step) for step in range(20000)])
    shares = torch.bincount(draws, minlength=4) / 20000
    assert shares[2] == 0
    # 4 standard deviations of a share of 0.5 over 20000 draws.
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0, 0.2]), atol=0.0142)
    other = draw(scores.expand(20000, -1), [uniform(8, step) for step in range(20000)])
    agreement = (draws == other).float().mean()
    assert 0.35 < agreement < 0.41, "independent draws agree with probability 0.38"


def test_each_token_of_a_request_is_a_new_draw() -> None:
    flat = torch.zeros(1, VOCAB)
    states = [state(output=tuple(range(step)), temperature=1.0, seed=3) for step in range(30)]
    drawn = [sample(flat, [made])[0].token_id for made in states]
    # 30 draws from 97 equal tokens: 26 distinct ones on average.
    assert len(set(drawn)) > 18


def test_uniform_is_fixed_across_runs_and_machines() -> None:
    assert [round(uniform(seed, step), 6) for seed, step in ((0, 0), (0, 1), (1, 0), (-1, 0))] == UNIFORMS
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_draw_at_the_edges_never_takes_a_token_of_no_mass() -> None:
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    assert draw(scores, [0.0]).tolist() == [1]
    assert draw(scores, [1 - 2**-48]).tolist() == [3]


def test_unusable_row_is_reported_and_disturbs_no_other() -> None:
    logits = logits_of(4)
    states = [state(temperature=1.0, seed=row, logprobs=1) for row in range(4)]
    alone = sample(logits[3:], states[3:])[0]
    logits[0, 5], logits[1, 0], logits[2] = float("nan"), float("inf"), float("-inf")
    found = sample(logits, states)
    assert [s.token_id for s in found[:3]] == [None] * 3
    assert found[3] == alone


def test_params_list_every_problem() -> None:
    with pytest.raises(Refused) as refused:
        SamplingParams(max_tokens=0, temperature=float("nan"), top_p=0, top_k=True, stop=("",), logprobs=21)
    for name in ("max_tokens 0", "temperature nan", "top_p 0", "top_k True", "stop ('',)", "logprobs 21"):
        assert name in str(refused.value)
    with pytest.raises(Refused, match="min_tokens 5: exceeds max_tokens 4"):
        SamplingParams(max_tokens=4, min_tokens=5)
    with pytest.raises(Refused, match="'beam_width' is unknown"):
        SamplingParams.from_dict({"beam_width": 2})
    with pytest.raises(Refused, match="max_tokens '5'"):
        SamplingParams.from_dict({"max_tokens": "5"})


def test_params_survive_the_wire() -> None:
    params = SamplingParams(max_tokens=3, stop=("a", "b"), stop_token_ids=(4,), temperature=0.5, seed=9, logprobs=0)
    assert SamplingParams.from_dict(params.to_dict()) == params
    assert SamplingParams().to_dict() == {}
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
