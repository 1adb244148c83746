"""What is wrong with a repository: one finding for each mistake, with what is allowed instead and how to get there."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
# Longer texts quote a damaged file.
_MAX_TEXT = 600


@dataclass(frozen=True)
class Finding:
    """`error`: it will not load, or not do what was asked; `warning`: it loads, and a setting has no or another effect.

    `check` names the kind of mistake for machines; `file` is relative to the repository where it lies inside.
    """

    severity: Severity
    check: str
    file: str
    key: str
    found: str
    allowed: str
    fix: str
    line: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def place(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass
class Findings:
    """Collects them; the same one is kept once."""

    items: list[Finding] = field(default_factory=list)

    def add(
        self,
        severity: Severity,
        check: str,
        file: str,
        key: str,
        found: object,
        allowed: str,
        fix: str,
        line: int | None = None,
    ) -> None:
        finding = Finding(
            severity, check, _shown(file), _shown(key), _shown(str(found)), _shown(allowed), _shown(fix), line
        )
        if finding not in self.items:
            self.items.append(finding)

    def sorted(self) -> list[Finding]:
        """Errors first, then by place."""
        return sorted(self.items, key=lambda f: (SEVERITIES.index(f.severity), f.file, f.line or 0))

    def count(self, severity: Severity) -> int:
        return sum(finding.severity == severity for finding in self.items)


def plural(count: int, word: str) -> str:
    """1 error, 2 errors."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _shown(text: str) -> str:
    """On one line: findings quote files that anything may be in."""
    text = text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
