"""Parameters: right names for the release, values of the right kind, nothing missing that must be there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress

from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import TritonModel
from trtbuild.migrate.parameters import (
    BATCHING_STRATEGIES,
    PARAMETERS,
    PRESENT,
    PRESENT_SINCE,
    RENAMED,
    REQUIRED,
    STATIC_BATCHING,
    Parameter,
    nearest,
)
from trtbuild.migrate.release import Release

_BOOLEANS = ("True", "true", "TRUE", "1", "False", "false", "FALSE", "0")
_TRUE = ("True", "true", "TRUE", "1")


def parse_int(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"[+-]?[0-9]{1,18}", text.strip(), re.ASCII) else None


def parse_float(text: str | None) -> float | None:
    with suppress(ValueError):
        return None if text is None else float(text)
    return None


def parse_bool(text: str | None) -> bool | None:
    """As the backend reads it; None where it does not."""
    return text in _TRUE if text in _BOOLEANS else None


def parse_ints(text: str | None) -> list[int] | None:
    """Comma-separated."""
    numbers = [parse_int(part) for part in (text or "").split(",")]
    return [n for n in numbers if n is not None] if None not in numbers else None


def parse_groups(text: str | None) -> list[list[int]] | None:
    """Comma-separated, groups of instances by semicolons."""
    groups = [parse_ints(part) for part in (text or "").split(";") if part.strip()]
    return [group for group in groups if group is not None] if groups and None not in groups else None


def parse_share(text: str | None) -> float | None:
    """From 0 to 1."""
    share = parse_float(text)
    return share if share is not None and 0 <= share <= 1 else None


_READERS: dict[str, tuple[Callable[[str], object], str]] = {
    "int": (parse_int, "a whole number"),
    "share": (parse_share, "a number from 0 to 1"),
    "bool": (parse_bool, "true or false"),
    "ints": (parse_ints, "whole numbers with commas between"),
    "groups": (parse_groups, "whole numbers with commas between, instances by semicolons"),
}


def check_parameters(model: TritonModel, release: Release | None, findings: Findings) -> None:
    known = PARAMETERS.get(model.role)
    if known is None:
        return
    for name in model.parameters:
        if name not in known:
            _check_unknown(model, name, findings)
        elif not known[name].is_read_by(release):
            _check_release(model, name, known[name], release, findings)
        else:
            _check_value(model, name, known[name], findings)
    for name in _missing(model, release):
        findings.add(
            "error", "missing_parameter", model.file, name, "missing", "it must be set",
            f'add parameters {{ key: "{name}" value {{ string_value: "..." }} }}',
        )  # fmt: skip
    if model.backend == "tensorrtllm" and release is not None and release.minor >= PRESENT_SINCE:
        for name in (name for name in PRESENT if name not in model.parameters):
            findings.add(
                "error", "missing_parameter", model.file, name, "missing", "it must be there, empty if it is not used",
                f'add parameters {{ key: "{name}" value {{ string_value: "" }} }}: the backend of 1.x asks for it',
            )  # fmt: skip


def _missing(model: TritonModel, release: Release | None) -> Iterator[str]:
    """Required ones that are not there at all, under no name, or empty."""
    meant = {RENAMED.get(name) or nearest(name, PARAMETERS[model.role]) for name in model.parameters}
    for name in REQUIRED.get(model.role, ()):
        value = model.parameters.get(name)
        if name == "gpt_model_path" and model.parameter("encoder_model_path"):
            continue
        if (value is None and name not in meant) or (value is not None and not value.text.strip()):
            yield name


def _check_unknown(model: TritonModel, name: str, findings: Findings) -> None:
    is_engine = model.role == "tensorrt_llm"
    right = (RENAMED.get(name) if is_engine else None) or nearest(
        name, PARAMETERS[model.role], 0.8 if is_engine else 0.9
    )
    if right is not None:
        findings.add(
            "error", "parameter_name", model.file, name, name, right,
            f"rename it to {right}; as it is, the value has no effect", model.line_of(name),
        )  # fmt: skip
    elif is_engine:
        findings.add(
            "warning", "parameter_name", model.file, name, name, "a parameter of the backend",
            "the backend does not read it; remove it", model.line_of(name),
        )  # fmt: skip


def _check_release(model: TritonModel, name: str, row: Parameter, release: Release | None, findings: Findings) -> None:
    right = RENAMED.get(name)
    if row.until is not None:
        allowed = right or f"up to release {row.until[0]}.{row.until[1]}"
        fix = f"rename it to {right}" if right else "remove it: this release does not read it"
    else:
        since = row.since or (0, 0)
        allowed = f"from about release {since[0]}.{since[1]} on"
        fix = f"{release} does not read it: remove it, or serve with a newer release"
    findings.add(
        "warning", "parameter_release", model.file, name, f"set for {release}", allowed, fix, model.line_of(name)
    )


def _check_value(model: TritonModel, name: str, row: Parameter, findings: Findings) -> None:
    text = model.parameter(name)
    if text is None:
        return
    if name == "gpt_model_type":
        _check_batching(model, text, findings)
        return
    allowed = _allowed(text, row)
    if allowed is None:
        return
    fix = f"write {allowed}; as it is, it is taken as not set: {row.default}"
    if row.kind == "choice" and (right := nearest(text, row.choices, 0.6)):
        fix = f"write {right}; as it is, it is taken as not set: {row.default}"
    # A share that is a number is not taken as unset, but refused by the runtime.
    is_refused = row.kind == "share" and parse_float(text) is not None
    fix = f"write {allowed}" if is_refused else fix
    findings.add(
        "error" if is_refused else "warning",
        "parameter_value",
        model.file,
        name,
        text,
        allowed,
        fix,
        model.line_of(name),
    )


def _allowed(text: str, row: Parameter) -> str | None:
    """None where the value is right; else what would be."""
    if row.kind == "choice":
        return None if text in row.choices else "one of " + ", ".join(row.choices)
    parse, allowed = _READERS.get(row.kind, (None, ""))
    return None if parse is None or parse(text) is not None else allowed


def _check_batching(model: TritonModel, text: str, findings: Findings) -> None:
    line, allowed = model.line_of("gpt_model_type"), " or ".join(BATCHING_STRATEGIES)
    if text in STATIC_BATCHING:
        findings.add(
            "warning", "static_batching", model.file, "gpt_model_type", text, allowed,
            "static batching was removed; write inflight_fused_batching", line,
        )  # fmt: skip
    elif text not in BATCHING_STRATEGIES:
        findings.add(
            "error", "parameter_value", model.file, "gpt_model_type", text, allowed,
            "write inflight_fused_batching; the backend does not load with anything else", line,
        )  # fmt: skip
