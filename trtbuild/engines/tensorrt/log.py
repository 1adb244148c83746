"""TensorRT's log, kept line by line: the only place where a layer that was not added as asked is reported.

TensorRT uses the first logger that a process gives it and ignores later ones, so there is one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import tensorrt_rtx as trt

from trtbuild.errors import EngineBuildError

# A machine without an NVIDIA driver can compile all the same; the library reports the missing driver as an error.
HARMLESS_ERRORS = ("cudaError 35", "CUDA initialization failure with error: 35")


# Errors that have a known way around.
REMEDIES = {
    "is_decomposable": "attention found no fused kernel; with few experts on a rank a smaller --segment-layers helps",
    "FP32 GEMM is not supported": "a router needs a target of sm80 or newer",
}


class BuildLog(trt.ILogger):
    """Collects the lines of one build; `clear` begins the next."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: trt.ILogger.Severity, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR and not any(text in message for text in HARMLESS_ERRORS):
            self.errors.append(message)
        if severity <= trt.ILogger.Severity.INFO:
            self.lines.append(f"[{severity.name}] {message}")

    def clear(self) -> None:
        self.lines.clear()
        self.errors.clear()

    def check(self, subject: str) -> None:
        """Raise `EngineBuildError` where an error was logged, even if the library went on."""
        if self.errors:
            shown = "\n  ".join(self.errors[:5])
            fixes = [fix for text, fix in REMEDIES.items() if any(text in error for error in self.errors)]
            hint = "".join(f"\n  ({fix})" for fix in fixes)
            raise EngineBuildError(f"{subject}: TensorRT logged {len(self.errors)} error(s):\n  {shown}{hint}")

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n", encoding="utf-8")


@cache
def build_log() -> BuildLog:
    """The process's logger."""
    return BuildLog()
