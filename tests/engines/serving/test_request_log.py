"""The worker's log lines: one a record, readable by machines, and nothing from outside can break a line."""

from __future__ import annotations

import json
import logging

import pytest

from trtbuild.engines.serving.request import Request, Usage
from trtbuild.engines.serving.request_log import JsonFormatter, TextFormatter, log_request

USAGE = Usage(prompt_tokens=2, completion_tokens=3, reused_tokens=0, queue_s=0.25, ttft_s=None, total_s=1 / 3)


def logged(caplog: pytest.LogCaptureFixture, **values: str) -> logging.LogRecord:
    with caplog.at_level(logging.INFO, "trtbuild.worker"):
        log_request(Request("1:7", [8, 9], caller_id='evil\n{"a": 1}'), "error", USAGE, **values)
    return caplog.records[-1]


def test_json_line(caplog: pytest.LogCaptureFixture) -> None:
    line = JsonFormatter().format(logged(caplog, error="broken\nline"))
    assert "\n" not in line
    values = json.loads(line)
    assert values.pop("time").endswith("Z")
    assert values == {
        "level": "info",
        "message": "request",
        "id": "1:7",
        "reason": "error",
        "request_id": 'evil\n{"a": 1}',
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "reused_tokens": 0,
        "queue_s": 0.25,
        "ttft_s": None,
        "total_s": 0.333333,
        "error": "broken\nline",
    }


def test_text_line_quotes_what_came_from_outside(caplog: pytest.LogCaptureFixture) -> None:
    line = TextFormatter().format(logged(caplog))
    assert "\n" not in line and 'INFO request id="1:7" reason="error" request_id="evil\\n' in line


def test_json_line_of_an_exception() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "it %s", ("failed",), (type(error), error, None))
    values = json.loads(JsonFormatter().format(record))
    assert (values["message"], values["level"]) == ("it failed", "error") and "ValueError: no" in values["traceback"]
