"""The scheduler over an executor that shows every mistake: any mix gives each request its solo answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from fake_executor import TINY_MIXTRAL, FakeExecutor, logits_after, request
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trtbuild.engines.serving.detokenizer import decoder_of
from trtbuild.engines.serving.request import Request, RequestOutput, TokenEvent
from trtbuild.engines.serving.scheduler import Scheduler
from trtbuild.engines.serving.slots import common_prefix
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused

EOS = 2
MIXTRAL = AutoTokenizer.from_pretrained(TINY_MIXTRAL)


def solo(wanted: Request, **executor: Any) -> RequestOutput:
    return Scheduler(FakeExecutor(**executor), eos_token_ids=[EOS]).run([wanted])[0]


def greedy_by_hand(prompt: list[int], count: int, vocab: int = 32) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(int(logits_after(history, vocab).argmax()))
    return history[len(prompt) :]


PARAMS = st.sampled_from(
    [
        {"max_tokens": 6},
        {"max_tokens": 12, "ignore_eos": True},
        {"max_tokens": 3, "logprobs": 2},
        {"temperature": 1.0, "max_tokens": 9},
        {"temperature": 1.2, "top_p": 0.8, "max_tokens": 8, "min_tokens": 4},
        {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    ]
)
# A small alphabet and shared beginnings, so that slots' caches overlap by accident and on purpose.
PROMPTS = st.builds(
    lambda shared, tail: [5, 6, 7, 8, 9, 5, 6][:shared] + tail,
    st.integers(0, 7),
    st.lists(st.integers(3, 5), min_size=1, max_size=16),
)
JOBS = st.lists(
    st.tuples(PROMPTS, PARAMS, st.integers(0, 2**32), st.integers(0, 25), st.one_of(st.none(), st.integers(0, 12))),
    min_size=1,
    max_size=9,
)


@settings(deadline=None, max_examples=80)
@given(jobs=JOBS, num_slots=st.integers(1, 4), chunk=st.integers(1, 6), reuse=st.booleans())
def test_any_mix_gives_each_request_its_solo_answer(jobs: list[Any], num_slots: int, chunk: int, reuse: bool) -> None:
    scheduler = Scheduler(FakeExecutor(num_slots), eos_token_ids=[EOS], chunk_size=chunk, prefix_reuse=reuse)
    requests = [request(str(i), prompt, **params, seed=seed) for i, (prompt, params, seed, _, _) in enumerate(jobs)]
    outputs = {r.request_id: RequestOutput(r.request_id) for r in requests}
    step = 0
    while scheduler.has_work or any(arrival >= step for *_, arrival, _ in jobs):
        for made, (_, _, _, arrival, cancel_after) in zip(requests, jobs, strict=True):
            if arrival == step:
                scheduler.submit(made)
            if cancel_after is not None and arrival + cancel_after == step:
                scheduler.cancel(made.request_id)
        for event in scheduler.step():
            assert outputs[event.request_id].finish_reason is None, "an event after the last"
            outputs[event.request_id].add(event)
        step += 1
    for made in requests:
        found, alone = outputs[made.request_id], solo(made, num_slots=1)
        if found.finish_reason == "cancelled":
            assert found.token_ids == alone.token_ids[: len(found.token_ids)]
        else:
            assert replace(found, usage=None) == replace(alone, usage=None)
    stats = scheduler.stats()
    assert (stats.active, stats.waiting, stats.slots_used, stats.kv_tokens_used) == (0, 0, 0, 0)
    assert stats.finished + stats.cancelled == len(jobs)
    assert stats.generated_tokens == sum(len(o.token_ids) for o in outputs.values())


def test_greedy_is_what_the_logits_say() -> None:
    prompt = [4, 9, 1, 1, 8, 3, 7]
    found = solo(request("a", prompt, max_tokens=10, ignore_eos=True))
    assert found.token_ids == greedy_by_hand(prompt, 10)
    assert found.finish_reason == "length"
    assert found.usage is not None and (found.usage.prompt_tokens, found.usage.completion_tokens) == (7, 10)


def test_running_streams_wait_for_at_most_one_chunk() -> None:
    executor = FakeExecutor(num_slots=4, max_seq_len=200)
    scheduler = Scheduler(executor)
    scheduler.submit(request("stream", [3], max_tokens=100))
    scheduler.step()
    executor.calls.clear()
    for name in "abc":
        scheduler.submit(request(name, [*range(3, 32)] * 3, max_tokens=1))
    while scheduler.stats().active + scheduler.stats().waiting > 1:
        scheduler.step()
    since_decode, worst = 0, 0
    for call in executor.calls:
        since_decode = 0 if call[0] == "decode" else since_decode + call[3]
        worst = max(worst, since_decode)
    assert worst == executor.chunk_size
    assert all(0 in call[1] for call in executor.calls if call[0] == "decode")


def test_short_prompts_share_a_step_and_chunks_stay_whole() -> None:
    executor = FakeExecutor(num_slots=4, chunk_size=10)
    scheduler = Scheduler(executor)
    for name, length in (("a", 4), ("b", 5), ("c", 3), ("d", 1)):
        scheduler.submit(request(name, [3 + length] * length, max_tokens=4))
    scheduler.step()
    # c does not fit behind a and b; d would, but does not overtake.
    assert executor.calls == [("prefill", 0, 0, 4), ("prefill", 1, 0, 5), ("decode", (0, 1))]
    scheduler.step()
    assert executor.calls[3:] == [("prefill", 2, 0, 3), ("prefill", 3, 0, 1), ("decode", (0, 1, 2, 3))]


def test_admission_is_first_in_first_out() -> None:
    scheduler = Scheduler(FakeExecutor(num_slots=2), eos_token_ids=[EOS])
    requests = [request(str(i), [3 + i] * (1 + 3 * (i % 3)), max_tokens=3 + i % 2, ignore_eos=True) for i in range(8)]
    for made in requests:
        scheduler.submit(made)
    order = []
    while scheduler.has_work:
        for event in scheduler.step():
            order += [event.request_id] if event.request_id not in order else []
    assert order == [r.request_id for r in requests]


def test_prefix_reuse_takes_the_best_slot_and_computes_only_the_rest() -> None:
    executor = FakeExecutor(num_slots=3, chunk_size=20)
    scheduler = Scheduler(executor)
    scheduler.run([request("a", [5, 6, 7, 8], max_tokens=3), request("b", [5, 6, 9, 9, 9], max_tokens=3)])
    executor.calls.clear()
    follow_up = request("c", [5, 6, 9, 9, 9, *greedy_by_hand([5, 6, 9, 9, 9], 3), 4], max_tokens=2)
    output = scheduler.run([follow_up])[0]
    # The last answer token was sampled but never fed, so two of three are in the cache.
    assert executor.calls[0] == ("prefill", 1, 7, 2)
    assert output.usage is not None and output.usage.reused_tokens == 7
    assert output.token_ids == solo(follow_up).token_ids
    executor.calls.clear()
    scheduler.run([request("same", [5, 6, 7, 8], max_tokens=1)])
    assert executor.calls == [("prefill", 0, 3, 1)], "the last prompt token is computed again for its logits"
    executor.calls.clear()
    scheduler.run([request("other", [30, 30], max_tokens=1)])
    assert executor.calls == [("prefill", 2, 0, 2)], "with nothing in common, the slot unused for longest"
    assert scheduler.stats().prefix_reused_tokens == 7 + 3


def test_reuse_after_cancel_in_mid_prefill_sees_no_stale_cache() -> None:
    scheduler = Scheduler(FakeExecutor(num_slots=1, chunk_size=3), chunk_size=3)
    scheduler.run([request("old", [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], max_tokens=2)])
    scheduler.submit(request("half", [5, 5, 6, 6, 6, 6, 6, 6, 6, 6], max_tokens=2))
    scheduler.step()
    scheduler.cancel("half")
    again = request("again", [5, 5, 5, 5, 5, 5, 5, 5, 5, 5], max_tokens=4)
    output = scheduler.run([again])[0]
    assert output.token_ids == solo(again).token_ids
    assert output.usage is not None and output.usage.reused_tokens == 2


def test_cancel_frees_the_slot_at_once() -> None:
    executor = FakeExecutor(num_slots=1)
    scheduler = Scheduler(executor)
    scheduler.submit(request("a", [3, 4], max_tokens=30))
    scheduler.submit(request("b", [7, 8], max_tokens=2))
    scheduler.submit(request("c", [7, 9], max_tokens=2))
    scheduler.step()
    assert scheduler.cancel("a") and scheduler.cancel("c")
    assert scheduler.stats().slots_used == 0
    executor.calls.clear()
    events = scheduler.step()
    assert [(e.request_id, e.finish_reason) for e in events if e.finish_reason] == [
        ("a", "cancelled"),
        ("c", "cancelled"),
        ("b", "length"),
    ]
    assert executor.calls[0] == ("prefill", 0, 0, 2), "b runs in the very next step"
    assert not scheduler.cancel("a") and not scheduler.cancel("unknown")


def test_stop_ids_eos_and_min_tokens() -> None:
    prompt = [4, 9, 1]
    tokens = greedy_by_hand(prompt, 8)
    third = tokens[2]
    assert third not in tokens[:2]
    stopped = solo(request("a", prompt, stop_token_ids=[third], ignore_eos=True))
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[:3], "stop")
    end = Scheduler(FakeExecutor(), eos_token_ids=[third]).run([request("a", prompt)])[0]
    assert (end.token_ids, end.finish_reason) == (tokens[:3], "stop")
    ignored = Scheduler(FakeExecutor(), eos_token_ids=[third]).run(
        [request("a", prompt, ignore_eos=True, max_tokens=8)]
    )[0]
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")
    later = solo(request("a", prompt, stop_token_ids=[third], min_tokens=6, max_tokens=9, ignore_eos=True))
    assert third not in later.token_ids[:6] and len(later.token_ids) >= 6


@pytest.mark.parametrize("length", [1, 37, 38, 39])
def test_output_ends_where_the_slot_is_full(length: int) -> None:
    found = solo(request("a", [3] * length, ignore_eos=True))
    assert (len(found.token_ids), found.finish_reason) == (40 - length, "length")


def test_text_and_stop_strings_come_from_the_tokenizer() -> None:
    executor = FakeExecutor(num_slots=2, max_seq_len=60, vocab_size=1024)
    scheduler = Scheduler(executor, eos_token_ids=[EOS], decode_text=decoder_of(MIXTRAL))
    prompt = MIXTRAL.encode("To be")
    plain = scheduler.run([request("plain", prompt, max_tokens=30)])[0]
    assert plain.text == MIXTRAL.decode(plain.token_ids, skip_special_tokens=True)
    # A string across a token boundary: the last character of one token and the first of the next.
    pieces = [MIXTRAL.decode([i]) for i in plain.token_ids]
    at = next(i for i in range(4, 29) if all(p and p.isascii() for p in pieces[i : i + 2]))
    stop = pieces[at][-1] + pieces[at + 1][0]
    events: list[TokenEvent] = []
    scheduler.submit(request("stopped", prompt, max_tokens=30, stop=[stop]))
    while scheduler.has_work:
        events += scheduler.step()
    shown = "".join(e.text for e in events)
    assert shown == plain.text[: plain.text.index(stop)]
    assert events[-1].finish_reason == "stop"
    with pytest.raises(Refused, match="stop strings need a tokenizer"):
        Scheduler(FakeExecutor()).submit(request("a", [3], stop=["x"]))


def test_bad_requests_are_refused_and_leave_nothing() -> None:
    scheduler = Scheduler(FakeExecutor())
    for prompt, why in (
        ([3] * 40, "40 tokens, at most 39 are accepted"),
        ([], "no tokens"),
        ([3, 32], "token id 32 is outside the vocabulary of 32"),
        ([-1], "token id -1"),
    ):
        with pytest.raises(Refused, match=why):
            scheduler.submit(request("bad", prompt))
    with pytest.raises(Refused, match="5 tokens, at most 4 are accepted"):
        Scheduler(FakeExecutor(), max_input_len=4).submit(request("long", [3] * 5))
    scheduler.submit(request("a", [3]))
    with pytest.raises(Refused, match="in flight"):
        scheduler.submit(request("a", [4]))
    assert (scheduler.stats().refused, scheduler.stats().waiting) == (5, 1)


def test_logits_that_are_not_finite_end_one_request_only() -> None:
    executor = FakeExecutor()
    executor.nan_after = (9, 9)
    scheduler = Scheduler(executor, eos_token_ids=[EOS])
    good = request("good", [3, 4, 5], max_tokens=6)
    outputs = scheduler.run([request("bad", [9, 9, 9], max_tokens=6), good])
    assert outputs[0].finish_reason == "error" and "not finite" in (outputs[0].error or "")
    assert outputs[1].token_ids == solo(good).token_ids
    assert (scheduler.stats().failed, scheduler.stats().finished, scheduler.stats().slots_used) == (1, 1, 0)


@pytest.mark.parametrize("length", [1, 5, 6, 17, 40])
def test_score_gives_each_prompt_tokens_logprob(length: int) -> None:
    prompt = [(7 * i) % 29 + 1 for i in range(length)]
    scheduler = Scheduler(FakeExecutor())
    # A warm slot must not shorten it: the logits of reused tokens are not in any cache.
    scheduler.run([request("warm", [*prompt[:20], 3], max_tokens=1)])
    output = scheduler.run([Request("score", prompt, score_only=True)])[0]
    expected = [float(logits_after(prompt[:i], 32).log_softmax(-1)[prompt[i]]) for i in range(1, length)]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert list(output.prompt_logprobs[1:]) == pytest.approx(expected, abs=1e-5)
    assert output.token_ids == [] and scheduler.stats().slots_used == 0


def test_unseeded_requests_differ_and_seeded_ones_repeat() -> None:
    def run(seed: int | None) -> list[int]:
        return solo(request("a", [3, 4], temperature=1.5, max_tokens=20, ignore_eos=True, seed=seed)).token_ids

    assert run(5) == run(5) != run(6)
    assert run(None) != run(None)


def test_texts_of_single_tokens_come_with_logprobs() -> None:
    executor = FakeExecutor(num_slots=2, max_seq_len=60, vocab_size=1024)
    vocabulary = Vocabulary(MIXTRAL, 1024, [EOS])
    scheduler = Scheduler(executor, decode_text=decoder_of(MIXTRAL), vocabulary=vocabulary)
    asked, plain = scheduler.run([request("a", [5, 6], max_tokens=20, logprobs=3), request("b", [5, 6], max_tokens=20)])
    assert asked.token_texts == [MIXTRAL.decode([i]) for i in asked.token_ids]
    assert asked.top_texts == [tuple(MIXTRAL.decode([i]) for i, _ in top) for top in asked.top_logprobs]
    assert all(len(texts) == 3 for texts in asked.top_texts)
    assert plain.token_texts == [None] * 20 and plain.top_texts == [()] * 20
    assert vocabulary.text_of(2) == "</s>"


@given(left=st.lists(st.integers(0, 1), max_size=12), right=st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix(left: list[int], right: list[int]) -> None:
    differing = [i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b]
    expected = differing[0] if differing else min(len(left), len(right))
    assert common_prefix(left, right) == expected
