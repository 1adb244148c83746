"""The worker's log: text or JSON lines on stderr, and one line for every request that ends.

Prompts and answers are never logged; the caller's own request id is, so that a request can be followed through Triton
and the front end.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from trtbuild.engines.serving.request import Request, Usage

log = logging.getLogger("trtbuild.worker")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, message, and what `extra={"fields": {...}}` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback is a field of it."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        values: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        values |= getattr(record, "fields", {})
        if record.exc_info:
            values["traceback"] = self.formatException(record.exc_info)
        return json.dumps(values)


class TextFormatter(logging.Formatter):
    """Time, level, message, then name=value of the same fields; text that came from outside is quoted."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """The line without a traceback."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        return super().formatMessage(record) + "".join(f" {name}={json.dumps(v)}" for name, v in fields.items())


def configure_logging(form: str) -> None:
    """Send every log record of this process to stderr as "text" or "json"."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def log_request(request: Request, reason: str, usage: Usage | None, error: str | None = None) -> None:
    """One line for a request that ended; `usage` is None where it was never queued."""
    fields: dict[str, Any] = {"id": request.request_id, "reason": reason}
    if request.caller_id is not None:
        fields["request_id"] = request.caller_id
    if usage is not None:
        fields |= {name: _rounded(value) for name, value in vars(usage).items()}
    if error is not None:
        fields["error"] = error
    log.info("request", extra={"fields": fields})


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if isinstance(value, float) else value
