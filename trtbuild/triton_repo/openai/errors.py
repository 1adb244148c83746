"""What can go wrong, as OpenAI's error bodies: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

# Messages quote requests; nobody needs a megabyte of their own prompt back.
_MAX_MESSAGE = 2000
# What our Triton model's messages begin with; Triton itself may put the request's id before it.
_KIND = re.compile(r"^(?:\[request id: [^\]]*\]\s*)?(refused|unavailable|timeout|failed): ", re.DOTALL)
_UNKNOWN_MODEL = re.compile(r"unknown model|model .* is not (found|ready)|has no available versions", re.IGNORECASE)
# Triton starts the model's process again by itself.
_STUB_DOWN = re.compile(r"stub process .* is not healthy|failed to restart stub", re.IGNORECASE)
_QUEUE_FULL = re.compile(r"queue|waiting", re.IGNORECASE)

_TYPES = {401: "invalid_request_error", 408: "timeout_error", 429: "rate_limit_error"}
_CODES = {408: "timeout", 413: "request_too_large", 429: "rate_limit_exceeded", 503: "service_unavailable"}


class ApiError(Exception):
    """One refused or failed request: HTTP status, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + " ..."
        self.param = param
        self.code = code or _CODES.get(status)
        self.retry_after_s = retry_after_s if retry_after_s is not None else (1 if status in {429, 503} else None)

    def body(self) -> dict[str, Any]:
        """The JSON body of the response, or of an error chunk in a stream."""
        default = "invalid_request_error" if self.status < 500 else "server_error"
        error_type = _TYPES.get(self.status, default)
        # A lone surrogate out of a bad request cannot be written as UTF-8.
        message = self.message.encode("utf-8", "backslashreplace").decode()
        param = None if self.param is None else self.param.encode("utf-8", "backslashreplace").decode()
        return {"error": {"message": message, "type": error_type, "param": param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Retry-After where asking again helps."""
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


class ClientGone(Exception):
    """The HTTP client closed its connection; there is nobody left to answer."""


def refused(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """A request that must be changed before it is sent again."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, why: str) -> ApiError:
    """A field of OpenAI's interface that this server does not implement."""
    return refused(f"{param!r} is not supported: {why}", param, "unsupported_parameter")


def model_not_found(name: str, known: Iterable[str]) -> ApiError:
    """404, with the models that there are."""
    served = ", ".join(sorted(known)) or "none is ready"
    return ApiError(
        404, f"the model {name!r} does not exist; served here: {served}", param="model", code="model_not_found"
    )


def from_triton(message: str) -> ApiError:
    """An error that came out of Triton, told apart by the beginning of its message.

    "refused: " 400; "unavailable: " 429 where the queue is full and 503 otherwise; "timeout: " 408; all else 500.
    """
    found = _KIND.match(message)
    if found is None:
        if _UNKNOWN_MODEL.search(message):
            return ApiError(404, message, param="model", code="model_not_found")
        return ApiError(503 if _STUB_DOWN.search(message) else 500, f"Triton failed: {message}")
    kind, text = found[1], message[found.end() :]
    if kind == "refused":
        return refused(text)
    if kind == "timeout":
        return ApiError(408, text)
    if kind == "unavailable":
        return ApiError(429 if _QUEUE_FULL.search(text) else 503, text)
    return ApiError(500, text)


def from_validation(problems: Iterable[Mapping[str, Any]]) -> ApiError:
    """One 400 that lists every problem pydantic found (ten at most); `param` is the first one's."""
    found = list(problems)
    if any(problem["type"] == "json_invalid" for problem in found):
        detail = next((p.get("ctx", {}).get("error") for p in found if p["type"] == "json_invalid"), None)
        return refused(f"the body is not valid JSON: {detail or 'cannot be parsed'}", code="invalid_json")
    lines = [f"{_path(problem['loc']) or 'body'}: {problem['msg']}" for problem in found]
    more = f"; and {len(lines) - 10} more" if len(lines) > 10 else ""
    unknown = bool(found) and found[0]["type"] == "extra_forbidden"
    return refused(
        "; ".join(lines[:10]) + more,
        _path(found[0]["loc"]) or None if found else None,
        "unknown_parameter" if unknown else "invalid_value",
    )


def _path(location: Iterable[Any]) -> str:
    """("body", "messages", 0, "role") -> messages[0].role, shortened, since its keys are the client's."""
    text = ""
    for part in list(location)[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else str(part)
    return text[:200]
