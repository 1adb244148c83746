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
- A bad request is refused at submission, as is any while more than `max_queue` would wait. One whose logits are not
  finite, or whose guide cannot be followed, ends alone, with an error; one whose deadline has passed before a step,
  waiting or running, does not take part in it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from trtbuild.engines.executor import Executor
from trtbuild.engines.serving.constraints import Constrainer
from trtbuild.engines.serving.detokenizer import Decode, TextStream
from trtbuild.engines.serving.in_flight import InFlight
from trtbuild.engines.serving.request import FinishReason, Request, RequestOutput, TokenEvent
from trtbuild.engines.serving.sampling import Constraint, Sample, SamplerState, sample, token_logprobs
from trtbuild.engines.serving.slots import SlotPool
from trtbuild.engines.serving.stats import Counters, SchedulerStats
from trtbuild.engines.serving.vocabulary import Vocabulary
from trtbuild.errors import Refused, Unavailable


class Scheduler:
    """Runs requests over `executor`.

    `decode_text` turns ids into text (None: events carry no text, and stop strings are refused); `vocabulary` is needed
    for guides, bad strings and the texts of single tokens. `chunk_size` caps the prefill tokens of a step,
    `max_input_len` those of a prompt, `max_queue` the requests that wait for a slot beyond those that get one in the
    next step (None: no limit); `prefix_reuse=False` recomputes every prompt; `clock` gives seconds.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        eos_token_ids: Iterable[int] = (),
        decode_text: Decode | None = None,
        vocabulary: Vocabulary | None = None,
        chunk_size: int | None = None,
        max_input_len: int | None = None,
        max_queue: int | None = None,
        prefix_reuse: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._executor = executor
        self._eos = frozenset(eos_token_ids)
        self._decode_text = decode_text
        self._vocabulary = vocabulary
        self._constrainer = Constrainer(vocabulary, executor.vocab_size)
        self._max_queue = max_queue
        self._chunk_size = min(chunk_size or executor.chunk_size, executor.chunk_size)
        self.max_input_len = min(max_input_len or executor.max_seq_len, executor.max_seq_len - 1)
        self._prefix_reuse = prefix_reuse
        self._clock = clock
        self._pool = SlotPool(executor.num_slots)
        self._waiting: deque[InFlight] = deque()
        self._active: dict[str, InFlight] = {}
        self._events: list[TokenEvent] = []
        self._counters = Counters()
        self._started_at = clock()

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._waiting or self._active or self._events)

    def constraints_of(self, request: Request) -> list[Constraint]:
        """For `submit`; made ahead, from any thread, they do not hold up the streams that run. Raises `Refused`."""
        return self._constrainer.of(request.params)

    def submit(self, request: Request, constraints: Sequence[Constraint] | None = None) -> None:
        """Queue a request. Raises `Refused` where it can never run and `Unavailable` where the queue is full; nothing
        of it is kept then.
        """
        try:
            self._check(request)
            if constraints is None:
                constraints = self.constraints_of(request)
        except Refused:
            self._counters.refused += 1
            raise
        self._check_queue()
        submitted_at = self._clock() if request.submitted_at is None else request.submitted_at
        self._waiting.append(InFlight(request, list(request.token_ids), submitted_at, constraints))

    def close(self) -> None:
        """End background threads."""
        self._constrainer.close()

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
        """Expire, admit, prefill, decode once; the events of all requests, each request's in order."""
        self._counters.steps += 1
        self._expire()
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
            max_queue=self._max_queue,
            uptime_s=self._clock() - self._started_at,
            **self._counters.to_dict(),
        )

    def _check(self, request: Request) -> None:
        problem = self._problem_of(request)
        if problem is not None:
            raise Refused(f"request {request.request_id}: {problem}")

    def _check_queue(self) -> None:
        if self._max_queue is None:
            return
        # Those that the next step admits do not wait.
        waiting = max(0, len(self._waiting) - self._pool.num_free)
        if len(self._waiting) >= self._pool.num_free and waiting >= self._max_queue:
            self._counters.queue_full += 1
            raise Unavailable(
                f"all {len(self._pool.slots)} slots are in use and {waiting} requests wait, at most {self._max_queue} "
                "may (--max-queue): try again later"
            )

    def _problem_of(self, request: Request) -> str | None:
        length = len(request.token_ids)
        limit = self._executor.max_seq_len if request.score_only else self.max_input_len
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

    def _expire(self) -> None:
        limited = [s for s in (*self._active.values(), *self._waiting) if s.expires_at is not None]
        if not limited:
            return
        now = self._clock()
        for sequence in limited:
            if sequence.expires_at is not None and now >= sequence.expires_at:
                if sequence.held_slot is None:
                    self._waiting.remove(sequence)
                error = f"the request's deadline of {sequence.request.params.deadline_s:g} s has passed"
                self._finish(sequence, "timeout", text=sequence.text.finish()[0], error=error)

    def _admit(self) -> None:
        while self._waiting:
            head = self._waiting[0]
            request, params = head.request, head.request.params
            # Scoring needs the logits of every prompt token, which a cache does not hold.
            found = self._pool.acquire(request.request_id, head.prompt, self._prefix_reuse and not request.score_only)
            if found is None:
                return
            self._waiting.popleft()
            head.held_slot, head.reused = found
            head.prefilled, head.admitted_at = head.reused, self._clock()
            self._counters.histograms.queue_seconds.observe(head.admitted_at - head.submitted_at)
            if not request.score_only:
                head.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos)
                vocab_size, device = self._executor.vocab_size, self._executor.device
                head.held_sampler = SamplerState(
                    params, head.prompt, vocab_size, device, head.stop_ids, head.constraints
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

    def _prefill_chunk(self, sequence: InFlight, size: int) -> None:
        slot, start = sequence.slot, sequence.prefilled
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
            self._take_samples([sequence], sample(logits, [sequence.sampler]))

    def _decode(self) -> None:
        running = sorted((s for s in self._active.values() if not s.prefilling), key=lambda s: s.slot.index)
        if not running:
            return
        slots = [s.slot for s in running]
        tokens = [s.output[-1] for s in running]
        positions = [len(s.prompt) + len(s.output) - 1 for s in running]
        logits = self._executor.decode([slot.index for slot in slots], tokens, positions)
        for slot, token, position in zip(slots, tokens, positions, strict=True):
            slot.write(position, [token])
        self._take_samples(running, sample(logits, [s.sampler for s in running]))

    def _take_samples(self, sequences: Sequence[InFlight], samples: Sequence[Sample]) -> None:
        for sequence, chosen in zip(sequences, samples, strict=True):
            if chosen.token_id is None:
                self._finish(sequence, "error", text=sequence.text.finish()[0], error=chosen.problem)
            else:
                self._take_token(sequence, chosen.token_id, chosen)

    def _take_token(self, sequence: InFlight, token_id: int, chosen: Sample) -> None:
        now, histograms = self._clock(), self._counters.histograms
        if sequence.first_token_at is None or sequence.last_token_at is None:
            sequence.first_token_at = now
            histograms.ttft_seconds.observe(now - sequence.submitted_at)
        else:
            histograms.itl_seconds.observe(now - sequence.last_token_at)
        sequence.last_token_at = now
        sequence.output.append(token_id)
        sequence.sampler.accept(token_id)
        self._counters.generated_tokens += 1
        limit = self._executor.max_seq_len - len(sequence.prompt)
        if sequence.request.params.max_tokens is not None:
            limit = min(limit, sequence.request.params.max_tokens)
        text, reason = "", None
        if token_id in sequence.stop_ids:
            reason = "stop"
        else:
            text, stopped = sequence.text.push(token_id)
            full = len(sequence.output) >= limit
            reason = "stop" if stopped or sequence.sampler.complete else "length" if full else None
            if stopped:
                sequence.text = TextStream(None)
        if reason is None:
            self._events.append(self._event(sequence, token_id, text, chosen))
            return
        rest, stopped = sequence.text.finish()
        event = self._event(sequence, token_id, text + rest, chosen)
        self._finish(sequence, "stop" if stopped else reason, event=event, now=now)

    def _event(self, sequence: InFlight, token_id: int, text: str, chosen: Sample) -> TokenEvent:
        event = TokenEvent(sequence.request.request_id, token_id, text, chosen.logprob, chosen.top_logprobs)
        if chosen.logprob is None or self._vocabulary is None:
            return event
        text_of = self._vocabulary.text_of
        return replace(event, token_text=text_of(token_id), top_texts=tuple(text_of(i) for i, _ in chosen.top_logprobs))

    def _finish(
        self,
        sequence: InFlight,
        reason: FinishReason,
        *,
        event: TokenEvent | None = None,
        text: str = "",
        error: str | None = None,
        now: float | None = None,
    ) -> None:
        """Free the slot and report the end of a request, whether it was waiting or active.

        `event`: its last token; without one, `text` is what was held back.
        """
        if sequence.held_slot is not None:
            self._pool.release(sequence.held_slot)
            del self._active[sequence.request.request_id]
        usage = sequence.usage(self._clock() if now is None else now)
        score_only = sequence.request.score_only
        self._counters.count_end(reason)
        if reason in ("stop", "length") and not score_only:
            histograms = self._counters.histograms
            histograms.e2e_seconds.observe(usage.total_s)
            histograms.prompt_tokens.observe(usage.prompt_tokens)
            histograms.completion_tokens.observe(usage.completion_tokens)
        scored = tuple(sequence.prompt_logprobs) if score_only and reason == "length" else None
        last = event or TokenEvent(sequence.request.request_id, text=text)
        self._events.append(replace(last, finish_reason=reason, error=error, usage=usage, prompt_logprobs=scored))
