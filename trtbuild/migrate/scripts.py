"""Shell scripts beside the models: removed flags of trtllm-build, and how many ranks they start."""

from __future__ import annotations

import re
from pathlib import Path

from trtbuild.engines.tensorrt_llm.flags import GONE
from trtbuild.migrate.findings import Findings

_CONTINUED = re.compile(r"\\\n")
_FLAG = re.compile(r"(?<!\S)--?(\w+)(?:[= ]|$|\n)")
_WORLD_SIZE = re.compile(r"--world[_-]size[= ]+(\d{1,5})\b")
_MPIRUN = re.compile(r"\bmpirun\b[^\n]*?\s-(?:n|np)\s+(\d{1,5})\b[^\n]*\btritonserver\b")
_MAX_SCRIPT = 1 << 20


def check_scripts(repository: Path, findings: Findings) -> None:
    for path, text in _scripts(repository):
        for command, line in _commands(text, "trtllm-build"):
            for name in _FLAG.findall(command):
                if name in GONE:
                    findings.add(
                        "warning", "removed_flag", path.name, f"--{name}", f"--{name}", GONE[name],
                        f"trtllm-build 1.x has no --{name}; in its place: {GONE[name]}", line,
                    )  # fmt: skip


def world_size_of_scripts(repository: Path) -> int | None:
    """Ranks that the scripts start, where they agree about it."""
    found = set()
    for _, text in _scripts(repository):
        for command, _ in _commands(text, "launch_triton_server"):
            found |= {int(size) for size in _WORLD_SIZE.findall(command)}
        for command, _ in _commands(text, "mpirun"):
            # An app context for each rank says -n 1 each time.
            counts = [int(size) for size in _MPIRUN.findall(command)]
            found |= {counts[0]} if len(counts) == 1 and " : " not in command else set()
    return found.pop() if len(found) == 1 else None


def _scripts(repository: Path) -> list[tuple[Path, str]]:
    found = []
    for path in sorted(repository.glob("*.sh")):
        try:
            if path.is_file() and path.stat().st_size <= _MAX_SCRIPT:
                found.append((path, path.read_text(encoding="utf-8", errors="replace")))
        except OSError:
            continue
    return found


def _commands(text: str, word: str) -> list[tuple[str, int]]:
    """Logical lines that have the word, comments left out, each with the number of its first line."""
    joined = _CONTINUED.sub("\x00", text)
    commands, line = [], 1
    for logical in joined.split("\n"):
        plain = logical.replace("\x00", " ")
        if word in plain and not plain.lstrip().startswith("#"):
            commands.append((plain, line))
        line += 1 + logical.count("\x00")
    return commands
