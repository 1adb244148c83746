"""What a client asks of an engine and what it gets back: sampling parameters, requests, token events.

Free of torch, so that a thin client can import it. The scheduler, the worker's wire format and the client share
these types; whatever a request may say is validated here, once, with every problem reported together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from trtbuild.errors import refuse_all

FinishReason = Literal["length", "stop", "cancelled", "timeout", "error"]
GUIDE_TYPES = ("json", "json_schema", "regex", "ebnf_grammar")
"""TensorRT-LLM's names; "json" is any JSON object, "ebnf_grammar" is in llguidance's dialect of Lark."""

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 32
MAX_BAD_SEQUENCES = 256
MAX_BAD_CHARACTERS = 4096
MAX_GUIDE_CHARACTERS = 2**16
# Below this a temperature is greedy: the division would overflow float32 (vLLM has the same threshold).
GREEDY_BELOW = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Defaults: greedy, until the end token or a full slot.

    Penalties, order and logprobs are defined in `serving.sampling`. Raises `Refused` with every problem.
    """

    max_tokens: int | None = None
    """Tokens to generate at most; None: until the slot is full."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """None: a random one per request."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; neither they nor what follows is emitted."""
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    """Stop ids cannot be drawn and stop strings do not count before this many tokens."""
    ignore_eos: bool = False
    """Do not stop at the model's end tokens; `stop` and `stop_token_ids` still hold."""
    logprobs: int | None = None
    """None: none; n: the chosen token's log-probability and those of the n likeliest."""
    bad: tuple[str, ...] = ()
    """Strings that the answer never contains, however they are cut into tokens (`serving.bad_words`)."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens that the answer never contains."""
    guide_type: str | None = None
    """What the answer must match (`serving.guided`): one of GUIDE_TYPES, or None. Not with min_tokens or ignore_eos."""
    guide: str | None = None
    """The schema, pattern or grammar; None for "json"."""
    deadline_s: float | None = None
    """Seconds from submission after which the request ends with a timeout; None: no limit."""

    def __post_init__(self) -> None:
        for name in ("stop", "bad"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("stop", "stop_token_ids", "bad", "bad_token_ids"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.bad_token_ids, tuple):
            ids = tuple(tuple(s) if isinstance(s, list) else s for s in self.bad_token_ids)
            object.__setattr__(self, "bad_token_ids", ids)
        problems = [
            f"{name} {getattr(self, name)!r}: {allowed}"
            for name, (check, allowed) in _FIELD_CHECKS.items()
            if not check(getattr(self, name))
        ]
        refuse_all("sampling parameters", problems or self._contradictions())

    def _contradictions(self) -> list[str]:
        problems = []
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            problems.append(f"min_tokens {self.min_tokens}: exceeds max_tokens {self.max_tokens}")
        if (self.guide is not None) != (self.guide_type not in (None, "json")):
            problems.append(
                f"guide_type {self.guide_type}: "
                + ("json_schema, regex and ebnf_grammar need a guide" if self.guide is None else "it takes no guide")
            )
        if (count := sum(map(len, self.bad))) > MAX_BAD_CHARACTERS:
            problems.append(f"bad: {count} characters in all, at most {MAX_BAD_CHARACTERS} are accepted")
        if self.guide_type is not None and (self.min_tokens or self.ignore_eos):
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            problems.append(f"{name} with guide_type {self.guide_type}: the guide says where the answer ends")
        return problems

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamplingParams:
        """From decoded JSON; raises `Refused` for unknown names and bad values."""
        known = {f.name for f in fields(cls)}
        refuse_all(
            "sampling parameters",
            [f"{name!r} is unknown; known: {', '.join(sorted(known))}" for name in values if name not in known],
        )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Only what differs from the defaults, ready for JSON."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def constrained(self) -> bool:
        return bool(self.bad or self.bad_token_ids) or self.guide_type is not None

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _is_int(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: object, low: int, high: int) -> bool:
    """Lone surrogates are no text: they have no UTF-8."""
    return isinstance(value, str) and low <= len(value) <= high and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_number(value: object, accept: Callable[[float], bool]) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and accept(value)


def _are_all(values: object, accept: Callable[[Any], bool], most: int) -> bool:
    return isinstance(values, tuple) and len(values) <= most and all(accept(value) for value in values)


_INT32 = 2**31 - 1
_FIELD_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda v: v is None or _is_int(v, 1, _INT32), "must be a whole number of at least 1, or None"),
    "temperature": (lambda v: _is_number(v, lambda x: 0 <= x <= 100), "must be a number from 0 (greedy) to 100"),
    "top_k": (lambda v: _is_int(v, 0, _INT32), "must be a whole number of at least 0 (0: off)"),
    "top_p": (lambda v: _is_number(v, lambda x: 0 < x <= 1), "must be above 0 and at most 1"),
    "min_p": (lambda v: _is_number(v, lambda x: 0 <= x <= 1), "must be from 0 to 1"),
    "repetition_penalty": (lambda v: _is_number(v, lambda x: 0.01 <= x <= 100), "must be from 0.01 to 100"),
    "presence_penalty": (lambda v: _is_number(v, lambda x: -2 <= x <= 2), "must be from -2 to 2"),
    "frequency_penalty": (lambda v: _is_number(v, lambda x: -2 <= x <= 2), "must be from -2 to 2"),
    "seed": (lambda v: v is None or _is_int(v, -(2**63), 2**64 - 1), "must be a 64-bit whole number, or None"),
    "stop": (
        lambda v: _are_all(v, lambda s: isinstance(s, str) and 0 < len(s) <= 1024, MAX_STOP_STRINGS),
        f"must be at most {MAX_STOP_STRINGS} strings of 1 to 1024 characters",
    ),
    "stop_token_ids": (
        lambda v: _are_all(v, lambda i: _is_int(i, 0, _INT32), 1024),
        "must be at most 1024 whole numbers of at least 0",
    ),
    "min_tokens": (lambda v: _is_int(v, 0, _INT32), "must be a whole number of at least 0"),
    "ignore_eos": (lambda v: isinstance(v, bool), "must be true or false"),
    "logprobs": (lambda v: v is None or _is_int(v, 0, MAX_LOGPROBS), f"must be from 0 to {MAX_LOGPROBS}, or None"),
    "bad": (
        lambda v: _are_all(v, lambda s: _is_text(s, 1, 1024), MAX_BAD_SEQUENCES),
        f"must be at most {MAX_BAD_SEQUENCES} strings of 1 to 1024 characters",
    ),
    "bad_token_ids": (
        lambda v: _are_all(v, lambda s: _are_all(s, lambda i: _is_int(i, 0, _INT32), 1024) and s, MAX_BAD_SEQUENCES),
        f"must be at most {MAX_BAD_SEQUENCES} sequences of 1 to 1024 whole numbers of at least 0",
    ),
    "guide_type": (lambda v: v is None or v in GUIDE_TYPES, f"must be one of {', '.join(GUIDE_TYPES)}, or None"),
    "guide": (
        lambda v: v is None or _is_text(v, 1, MAX_GUIDE_CHARACTERS),
        f"must be text of 1 to {MAX_GUIDE_CHARACTERS} characters, or None",
    ),
    "deadline_s": (
        lambda v: v is None or _is_number(v, lambda x: 0 < x <= 1e9),
        "must be a number of seconds above 0, or None",
    ),
}


@dataclass(frozen=True)
class Request:
    """One prompt, already tokenized. `score_only`: no token is generated, the prompt's log-probabilities are."""

    request_id: str
    token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    score_only: bool = False
    caller_id: str | None = None
    """What the caller calls it; for logs only."""
    submitted_at: float | None = None
    """When it came in, on the scheduler's clock; None: when it is submitted to the scheduler."""


@dataclass(frozen=True)
class ServerLimits:
    """How a worker admits and ends."""

    drain_s: float
    """How long requests in flight may go on after SIGTERM."""
    max_queue: int | None = None
    """Requests that may wait for a slot; None: any number."""
    linger_s: float | None = None
    """Exit after this long without a client; None: never."""
    prepare_guides: bool = False
    """Read the vocabulary for guides before the first client; else the first guided request holds up all for it."""


@dataclass(frozen=True)
class Usage:
    """What a finished request took: token counts, and seconds on the scheduler's clock."""

    prompt_tokens: int
    completion_tokens: int
    reused_tokens: int
    """Prompt tokens found in the slot's cache, not computed again."""
    queue_s: float
    """From submission to a slot."""
    ttft_s: float | None
    """From submission to the first token; None where there was none."""
    total_s: float


@dataclass(frozen=True)
class TokenEvent:
    """One step of a stream. The last event of a request, and only it, has a `finish_reason` and `usage`.

    `text` is what may be shown now: it can be empty (half a character, a possible stop string) or belong to earlier
    tokens. `token_id` is None where the event ends a request without a new token (cancelled, error, score).
    """

    request_id: str
    token_id: int | None = None
    text: str = ""
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    token_text: str | None = None
    """With `logprobs`: the text of this token alone, special tokens by name; half a character is U+FFFD."""
    top_texts: tuple[str, ...] = ()
    """The same of `top_logprobs`, in its order."""
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    """Of a scored prompt, per token; None for the first, which nothing predicts."""
    usage: Usage | None = None


@dataclass
class RequestOutput:
    """A whole answer, gathered from its events."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[float | None] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    token_texts: list[str | None] = field(default_factory=list)
    top_texts: list[tuple[str, ...]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_logprobs: tuple[float | None, ...] | None = None
    usage: Usage | None = None

    def add(self, event: TokenEvent) -> None:
        """Append one event of this request."""
        self.text += event.text
        if event.token_id is not None:
            self.token_ids.append(event.token_id)
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)
            self.token_texts.append(event.token_text)
            self.top_texts.append(event.top_texts)
        if event.finish_reason is not None:
            self.finish_reason, self.error = event.finish_reason, event.error
            self.prompt_logprobs, self.usage = event.prompt_logprobs, event.usage
