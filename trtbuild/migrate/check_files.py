"""Each model's own files: text format, placeholders, name, backend, version directories."""

from __future__ import annotations

import re
from typing import Any

from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import Repository, TritonModel
from trtbuild.migrate.parameters import PARAMETERS, REQUIRED, nearest
from trtbuild.migrate.pbtxt import placeholders

BACKENDS = ("tensorrtllm", "python")
_ERROR_LINE = re.compile(r"^(\d+):\d+ : (.*)", re.DOTALL)


def check_files(repository: Repository, findings: Findings) -> None:
    for model in repository.models:
        check_syntax(model, findings)
        check_placeholders(model, findings)
        if not model.is_broken:
            check_identity(model, findings)
        check_versions(model, findings)


def check_syntax(model: TritonModel, findings: Findings) -> None:
    """By Triton's own protobuf where it is installed; a placeholder outside of quotes is left to its own finding."""
    if any(value.is_placeholder and not value.is_quoted for _, value in model.root.scalars()):
        return
    config = _empty_config()
    problem = next(iter(model.document.problems), None) if config is None else _protobuf_problem(model.text, config)
    if problem is not None:
        line, what = problem
        findings.add(
            "error", "syntax", model.file, "text format", what, "protobuf text format of Triton's ModelConfig",
            "correct this line; Triton reads nothing of a file that it cannot parse", line,
        )  # fmt: skip


def _empty_config() -> Any:
    """Triton's ModelConfig; None where the extra that has it is not installed."""
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError:
        return None
    return model_config_pb2.ModelConfig()  # type: ignore[attr-defined]


def _protobuf_problem(text: str, config: Any) -> tuple[int, str] | None:
    """The first line that does not parse, and why."""
    from google.protobuf import text_format

    try:
        text_format.Parse(text, config)
    except (text_format.ParseError, ValueError, RecursionError) as error:
        match = _ERROR_LINE.match(str(error))
        return (int(match.group(1)), match.group(2)[:200]) if match else (1, str(error)[:200])
    return None


def check_placeholders(model: TritonModel, findings: Findings) -> None:
    """Those in strings mean "not set"; elsewhere nothing of the file can be read."""
    for key, value in model.root.scalars():
        if value.is_placeholder and not (key.startswith("parameters.") and value.is_quoted):
            names = ", ".join(f"${{{name}}}" for name in placeholders(value.text))
            findings.add(
                "error", "placeholder", model.file, key, value.text, "a value",
                f"put a value in place of {names}; Triton cannot read the file with it", value.line,
            )  # fmt: skip
    known = PARAMETERS.get(model.role, {})
    for name, value in model.parameters.items():
        if not value.is_placeholder or (model.role in PARAMETERS and name not in known):
            continue
        if name in REQUIRED.get(model.role, ()):
            findings.add(
                "error", "placeholder", model.file, name, value.text, "a value, it must be set",
                f"put the value of {name} there", value.line,
            )  # fmt: skip
            continue
        default = known[name].default if name in known else "what its model.py makes of it"
        findings.add(
            "info", "placeholder", model.file, name, value.text, "a value, or an empty string",
            f"it is taken as not set: {default}; set it, or remove the parameter", value.line,
        )  # fmt: skip


def check_identity(model: TritonModel, findings: Findings) -> None:
    """`name` and `backend`."""
    name, backend = model.root.value("name"), model.root.value("backend")
    if name is not None and not name.is_placeholder and name.text != model.name:
        findings.add(
            "error", "name", model.file, "name", name.text, f"{model.name!r}, the directory's name",
            "rename one of the two; Triton refuses a model whose name is not its directory's", name.line,
        )  # fmt: skip
    if model.role == "ensemble" or backend is None or backend.is_placeholder or backend.text in BACKENDS:
        return
    if model.role in ("other", "llmapi") or nearest(backend.text, BACKENDS, 0.6) is None:
        return
    right = "tensorrtllm" if model.role == "tensorrt_llm" else "python"
    findings.add(
        "error", "backend", model.file, "backend", backend.text, " or ".join(BACKENDS), f'write backend: "{right}"',
        backend.line,
    )  # fmt: skip


def check_versions(model: TritonModel, findings: Findings) -> None:
    """A model has a numbered directory, a Python model its model.py in there."""
    if model.role in ("llmapi", "gpt", "other"):
        return
    if not model.versions:
        findings.add(
            "error", "version_directory", model.file, f"{model.name}/1", "missing", "a directory named by a number",
            f"mkdir {model.name}/1 (git does not keep an empty one: put a file into it)",
        )  # fmt: skip
        return
    newest = model.versions[-1]
    if model.backend == "python" and not (newest / "model.py").is_file():
        findings.add(
            "error", "model_py", model.file, f"{model.name}/{newest.name}/model.py", "missing", "the model's code",
            "copy it from upstream's templates of the release that serves, or let `trtbuild package` write its own",
        )  # fmt: skip
