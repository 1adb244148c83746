"""In-flight batching over an executor's slots: admission, chunked prefill, decode, stop, cancel, stream.

Synchronous and single-threaded: the owner calls `submit`, `cancel` and `step` from one thread, and `step` returns
what happened. It drives any `Executor` and knows of none.

Policies:
- Requests are admitted first in, first out, as soon as a slot is free; a waiting request is never overtaken.
- A step runs prefill chunks of at most `chunk_size` tokens in all, then one decode over every running stream. So a
  stream waits for at most one chunk between two tokens, however long the prompts beside it are. With nothing to
  decode the same steps run back to back.
- Prompts are prefilled oldest first. A younger one joins the same step only where its whole chunk fits into what the
  older ones left: chunk boundaries, and with them a request's numerics, do not depend on its neighbours.
- An answer ends at a stop id (which is reported but has no text), a stop string, `max_tokens`, or when prompt and
  output fill `max_seq_len`.
- A bad request is refused at submission; one whose logits are not finite ends alone, with an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from trtbuild.engines.executor import Executor
from trtbuild.engines.serving.detokenizer import Decode, TextStream
from trtbuild.engines.serving.request import FinishReason, Request, RequestOutput, TokenEvent, Usage
from trtbuild.engines.serving.sampling import Sample, SamplerState, sample, token_logprobs
from trtbuild.engines.serving.slots import Slot, SlotPool
from trtbuild.errors import Refused


@dataclass(frozen=True)
class SchedulerStats:
    """Gauges of this moment, then counters since the start."""

    waiting: int
    active: int
    num_slots: int
    slots_used: int
    kv_tokens_used: int
    kv_tokens_total: int
    steps: int
    finished: int
    cancelled: int
    failed: int
    refused: int
    prompt_tokens: int
    """Of admitted requests, reused ones included."""
    prefix_reused_tokens: int
    generated_tokens: int


@dataclass
class _Counters:
    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    prefix_reused_tokens: int = 0
    generated_tokens: int = 0


@dataclass
class _Sequence:
    """A request in flight; `slot` is None while it waits."""

    request: Request
    prompt: list[int]
    submitted_at: float
    slot: Slot | None = None
    sampler: SamplerState | None = None
    text: TextStream = field(default_factory=lambda: TextStream(None))
    stop_ids: frozenset[int] = frozenset()
    prefilled: int = 0
    reused: int = 0
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=lambda: [None])
    admitted_at: float | None = None
    first_token_at: float | None = None

    @property
    def prefilling(self) -> bool:
        return self.prefilled < len(self.prompt)


class Scheduler:
    """Runs requests over `executor`.

    `decode_text` turns ids into text (None: events carry no text, and stop strings are refused). `chunk_size` caps
    the prefill tokens of a step, `max_input_len` those of a prompt; `prefix_reuse=False` recomputes every prompt;
    `clock` gives seconds.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        eos_token_ids: Iterable[int] = (),
        decode_text: Decode | None = None,
        chunk_size: int | None = None,
        max_input_len: int | None = None,
        prefix_reuse: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._eos = frozenset(eos_token_ids)
        self._decode_text = decode_text
        self._chunk_size = min(chunk_size or executor.chunk_size, executor.chunk_size)
        self._max_input_len = min(max_input_len or executor.max_seq_len, executor.max_seq_len - 1)
        self._prefix_reuse = prefix_reuse
        self._clock = clock
        self._pool = SlotPool(executor.num_slots)
        self._waiting: deque[_Sequence] = deque()
        self._active: dict[str, _Sequence] = {}
        self._events: list[TokenEvent] = []
        self._counters = _Counters()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._waiting or self._active or self._events)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises `Refused` where it can never run; nothing of it is kept then."""
        problem = self._problem_of(request)
        if problem is not None:
            self._counters.refused += 1
            raise Refused(f"request {request.request_id}: {problem}")
        self._waiting.append(_Sequence(request, list(request.token_ids), self._clock()))

    def cancel(self, request_id: str) -> bool:
        """End a request now; its slot is free at once and the next `step` reports it. False: not known (any more)."""
        sequence = self._active.get(request_id)
        if sequence is None:
            sequence = next((s for s in self._waiting if s.request.request_id == request_id), None)
            if sequence is None:
                return False
            self._waiting.remove(sequence)
        self._finish(sequence, "cancelled", text=sequence.text.finish()[0])
        return True

    def step(self) -> list[TokenEvent]:
        """Admit, prefill, decode once; the events of all requests, each request's in order."""
        self._counters.steps += 1
        self._admit()
        self._prefill()
        self._decode()
        events, self._events = self._events, []
        return events

    def run(self, requests: Iterable[Request]) -> list[RequestOutput]:
        """Submit all, step until nothing is left, return whole answers in the order given."""
        outputs: dict[str, RequestOutput] = {}
        for request in requests:
            self.submit(request)
            outputs[request.request_id] = RequestOutput(request.request_id)
        while self.has_work:
            for event in self.step():
                if event.request_id in outputs:
                    outputs[event.request_id].add(event)
        return list(outputs.values())

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            waiting=len(self._waiting),
            active=len(self._active),
            num_slots=len(self._pool.slots),
            slots_used=self._pool.num_used,
            kv_tokens_used=self._pool.num_cached_tokens,
            kv_tokens_total=len(self._pool.slots) * self._executor.max_seq_len,
            **vars(self._counters),
        )

    def _problem_of(self, request: Request) -> str | None:
        length = len(request.token_ids)
        limit = self._executor.max_seq_len if request.score_only else self._max_input_len
        known = request.request_id in self._active or any(
            s.request.request_id == request.request_id for s in self._waiting
        )
        if known:
            return "a request of this id is in flight"
        if length == 0:
            return "the prompt has no tokens"
        if length > limit:
            return (
                f"the prompt has {length} tokens, at most {limit} are accepted "
                f"(max_input_len; prompt and answer together: max_seq_len {self._executor.max_seq_len})"
            )
        vocab = self._executor.vocab_size
        bad = next((i for i in request.token_ids if not 0 <= i < vocab), None)
        if bad is not None:
            return f"token id {bad} is outside the vocabulary of {vocab}"
        if request.params.stop and self._decode_text is None:
            return "stop strings need a tokenizer, and this engine has none"
        return None

    def _admit(self) -> None:
        while self._waiting:
            head = self._waiting[0]
            request, params = head.request, head.request.params
            # Scoring needs the logits of every prompt token, which a cache does not hold.
            found = self._pool.acquire(request.request_id, head.prompt, self._prefix_reuse and not request.score_only)
            if found is None:
                return
            self._waiting.popleft()
            head.slot, head.reused = found
            head.prefilled, head.admitted_at = head.reused, self._clock()
            if not request.score_only:
                head.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
                head.sampler = SamplerState(
                    params, head.prompt, self._executor.vocab_size, self._executor.device, head.stop_ids
                )
                head.text = TextStream(self._decode_text, params.stop, params.min_tokens)
            self._active[request.request_id] = head
            self._counters.prompt_tokens += len(head.prompt)
            self._counters.prefix_reused_tokens += head.reused

    def _prefill(self) -> None:
        budget = self._chunk_size
        for sequence in [s for s in self._active.values() if s.prefilling]:
            size = min(self._chunk_size, len(sequence.prompt) - sequence.prefilled)
            if size > budget:
                return
            budget -= size
            self._prefill_chunk(sequence, size)

    def _prefill_chunk(self, sequence: _Sequence, size: int) -> None:
        slot, start = _slot_of(sequence), sequence.prefilled
        end = start + size
        chunk = sequence.prompt[start:end]
        score, last = sequence.request.score_only, end == len(sequence.prompt)
        logits = self._executor.prefill(slot.index, chunk, start, "all" if score else "last" if last else "none")
        slot.write(start, chunk)
        sequence.prefilled = end
        if score and logits is not None:
            targets = sequence.prompt[start + 1 : end + 1]
            sequence.prompt_logprobs += token_logprobs(logits[: len(targets)], targets) if targets else []
            if last:
                self._finish(sequence, "length")
        elif last and logits is not None:
            self._take_samples([sequence], sample(logits, [_sampler_of(sequence)]))

    def _decode(self) -> None:
        running = sorted((s for s in self._active.values() if not s.prefilling), key=lambda s: _slot_of(s).index)
        if not running:
            return
        slots = [_slot_of(s) for s in running]
        tokens = [s.output[-1] for s in running]
        positions = [len(s.prompt) + len(s.output) - 1 for s in running]
        logits = self._executor.decode([slot.index for slot in slots], tokens, positions)
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            slot.write(position, [token])
        self._take_samples(running, sample(logits, [_sampler_of(s) for s in running]))

    def _take_samples(self, sequences: Sequence[_Sequence], samples: Sequence[Sample]) -> None:
        for sequence, chosen in zip(sequences, samples, strict=True):
            if chosen.token_id is None:
                self._finish(
                    sequence,
                    "error",
                    text=sequence.text.finish()[0],
                    error="the engine produced logits that are not finite",
                )
            else:
                self._take_token(sequence, chosen.token_id, chosen)

    def _take_token(self, sequence: _Sequence, token_id: int, chosen: Sample) -> None:
        if sequence.first_token_at is None:
            sequence.first_token_at = self._clock()
        sequence.output.append(token_id)
        _sampler_of(sequence).accept(token_id)
        self._counters.generated_tokens += 1
        limit = self._executor.max_seq_len - len(sequence.prompt)
        if sequence.request.params.max_tokens is not None:
            limit = min(limit, sequence.request.params.max_tokens)
        text, reason = "", None
        if token_id in sequence.stop_ids:
            reason = "stop"
        else:
            text, stopped = sequence.text.push(token_id)
            reason = "stop" if stopped else "length" if len(sequence.output) >= limit else None
            if stopped:
                sequence.text = TextStream(None)
        if reason is None:
            self._events.append(
                TokenEvent(sequence.request.request_id, token_id, text, chosen.logprob, chosen.top_logprobs)
            )
            return
        rest, stopped = sequence.text.finish()
        self._finish(sequence, "stop" if stopped else reason, token_id=token_id, text=text + rest, chosen=chosen)

    def _finish(
        self,
        sequence: _Sequence,
        reason: FinishReason,
        *,
        token_id: int | None = None,
        text: str = "",
        chosen: Sample | None = None,
        error: str | None = None,
    ) -> None:
        """Free the slot and report the end of a request, whether it was waiting or active."""
        if sequence.slot is not None:
            self._pool.release(sequence.slot)
            del self._active[sequence.request.request_id]
        counted = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        setattr(self._counters, counted, getattr(self._counters, counted) + 1)
        now, start = self._clock(), sequence.submitted_at
        usage = Usage(
            prompt_tokens=len(sequence.prompt),
            completion_tokens=len(sequence.output),
            reused_tokens=sequence.reused,
            queue_s=(now if sequence.admitted_at is None else sequence.admitted_at) - start,
            ttft_s=None if sequence.first_token_at is None else sequence.first_token_at - start,
            total_s=now - start,
        )
        scored = sequence.request.score_only and reason == "length"
        self._events.append(
            TokenEvent(
                sequence.request.request_id,
                token_id,
                text,
                chosen.logprob if chosen else None,
                chosen.top_logprobs if chosen else (),
                finish_reason=reason,
                error=error,
                usage=usage,
                prompt_logprobs=tuple(sequence.prompt_logprobs) if scored else None,
            )
        )


def _slot_of(sequence: _Sequence) -> Slot:
    if sequence.slot is None:
        raise AssertionError(f"request {sequence.request.request_id} runs without a slot")
    return sequence.slot


def _sampler_of(sequence: _Sequence) -> SamplerState:
    if sequence.sampler is None:
        raise AssertionError(f"request {sequence.request.request_id} is sampled without a sampler")
    return sequence.sampler
