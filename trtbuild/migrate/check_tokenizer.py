"""tokenizer_dir of the Python models."""

from __future__ import annotations

import re

from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import TritonModel
from trtbuild.migrate.paths import Places

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model", "tekken.json",
    "qwen.tiktoken",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_tokenizer(model: TritonModel, places: Places, findings: Findings) -> None:
    text = model.parameter("tokenizer_dir")
    if model.role not in ("preprocessing", "postprocessing") or text is None:
        return
    line = model.line_of("tokenizer_dir")
    directory = places.find(text, model.versions[-1] if model.versions else None)
    if directory is None and _HUB_ID.fullmatch(text):
        findings.add(
            "info", "tokenizer", model.file, "tokenizer_dir", text, "a directory",
            "a hub id: it is downloaded when the server starts, in whatever revision is there then", line,
        )  # fmt: skip
    elif directory is None:
        findings.add(
            "error", "tokenizer_path", model.file, "tokenizer_dir", text, "a directory with a tokenizer",
            "there is no such directory here; where the container has it elsewhere, say --mount CONTAINER=HERE", line,
        )  # fmt: skip
    elif not any((directory / name).is_file() for name in TOKENIZER_FILES):
        findings.add(
            "error", "tokenizer_path", model.file, "tokenizer_dir", f"{text}: no tokenizer in it",
            "one of " + ", ".join(TOKENIZER_FILES[:3]), "copy the tokenizer's files of the model there", line,
        )  # fmt: skip
