"""The models of a repository, found by what they are and not by what they are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from trtbuild.errors import Refused
from trtbuild.migrate.findings import Findings
from trtbuild.migrate.parameters import PARAMETERS, RENAMED, Role
from trtbuild.migrate.pbtxt import Document, Message, Value, read_pbtxt
from trtbuild.migrate.tensor_tables import INPUTS, OUTPUTS

CONFIG_FILE = "config.pbtxt"
LLMAPI_FILE = "model.yaml"
# Told apart by their tensors and parameters.
_SCORED: tuple[Role, ...] = ("preprocessing", "tensorrt_llm", "postprocessing", "bls")
# A config.pbtxt is a few kilobytes; beyond this it is another kind of file.
_MAX_CONFIG = 8 << 20


@dataclass(frozen=True)
class Tensor:
    """An entry of `input` or `output`; `type` is without TYPE_, None where it is a placeholder or missing."""

    name: str
    type: str | None
    rank: int
    is_optional: bool
    line: int


@dataclass(frozen=True)
class TritonModel:
    """One directory of the repository. `file` is its config.pbtxt as findings name it."""

    directory: Path
    file: str
    text: str
    document: Document

    @property
    def name(self) -> str:
        """Triton's name of it: the directory's."""
        return self.directory.name

    @property
    def root(self) -> Message:
        return self.document.root

    @property
    def is_broken(self) -> bool:
        """Whether its blocks and lists do not close, so that what is read of it may be in the wrong place."""
        return bool(self.document.problems)

    @cached_property
    def parameters(self) -> dict[str, Value]:
        """string_value by key; an entry without one is empty."""
        found = {}
        for entry in self.root.messages("parameters"):
            key, value = entry.value("key"), entry.message("value")
            if key is not None:
                text = value.value("string_value") if value else None
                found[key.text] = text or Value("", key.line)
        return found

    def parameter(self, name: str) -> str | None:
        """None where it is missing, empty or a placeholder, which the backend takes as not set."""
        value = self.parameters.get(name)
        return None if value is None or not value.text.strip() or value.is_placeholder else value.text.strip()

    def line_of(self, name: str) -> int | None:
        value = self.parameters.get(name)
        return value.line if value else None

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        return _tensors(self.root, "input")

    @cached_property
    def outputs(self) -> dict[str, Tensor]:
        return _tensors(self.root, "output")

    @property
    def backend(self) -> str | None:
        """None where it is missing or a placeholder."""
        value = self.root.value("backend")
        return None if value is None or value.is_placeholder else value.text

    @property
    def max_batch_size(self) -> int | None:
        """None where it is no number; 0 where it is missing."""
        value = self.root.value("max_batch_size")
        return 0 if value is None else value.number

    @property
    def decoupled(self) -> bool | None:
        """None where it is missing or a placeholder."""
        policy = self.root.message("model_transaction_policy")
        value = policy.value("decoupled") if policy else None
        if value is None or value.is_placeholder:
            return None
        return value.text.lower() in ("true", "t", "1")

    @property
    def steps(self) -> list[Message]:
        scheduling = self.root.message("ensemble_scheduling")
        return scheduling.messages("step") if scheduling else []

    @property
    def versions(self) -> list[Path]:
        """Numbered directories, newest last."""
        return sorted(_directories(self.directory, lambda name: name.isdecimal()), key=lambda path: int(path.name))

    @cached_property
    def role(self) -> Role:
        return _role(self)


@dataclass(frozen=True)
class Repository:
    root: Path
    models: tuple[TritonModel, ...]

    def of(self, role: Role) -> list[TritonModel]:
        return [model for model in self.models if model.role == role]

    def named(self, name: str) -> TritonModel | None:
        return next((model for model in self.models if model.name == name), None)


def read_repository(root: Path, findings: Findings) -> Repository:
    """Every directory of `root` that has a config.pbtxt; those without are mentioned.

    Raises `Refused` where there is none at all.
    """
    if not root.is_dir():
        raise Refused(f"{root} is not a directory; give the one that Triton's --model-repository names")
    models = []
    for directory in _directories(root, lambda name: not name.startswith(".")):
        file = f"{directory.name}/{CONFIG_FILE}"
        text = _read_config(directory / CONFIG_FILE, file, findings)
        if text is not None:
            models.append(TritonModel(directory, file, text, read_pbtxt(text)))
        elif not (directory / CONFIG_FILE).exists():
            findings.add(
                "info", "no_config", directory.name, CONFIG_FILE, "missing", "one in each model's directory",
                "Triton tries to load every directory of its repository; move away what is no model",
            )  # fmt: skip
    if not models:
        hint = " (it is one model's directory: give its parent)" if (root / CONFIG_FILE).is_file() else ""
        raise Refused(f"{root}: no directory with a {CONFIG_FILE}; give Triton's model repository{hint}")
    return Repository(root, tuple(models))


def _directories(root: Path, wanted: Callable[[str], bool]) -> list[Path]:
    try:
        return sorted(path for path in root.iterdir() if path.is_dir() and wanted(path.name))
    except OSError as error:
        raise Refused(f"{root} cannot be read: {error.strerror}") from error


def _read_config(path: Path, file: str, findings: Findings) -> str | None:
    if not path.exists():
        return None
    try:
        size = path.stat().st_size
        content = path.read_bytes() if size <= _MAX_CONFIG else b""
    except OSError as error:
        findings.add(
            "error", "unreadable", file, CONFIG_FILE, error.strerror, "a readable file", "give it back its rights"
        )
        return None
    if size > _MAX_CONFIG:
        findings.add(
            "error", "unreadable", file, CONFIG_FILE, f"{size} bytes", "text format", "put the right file there"
        )
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        findings.add(
            "error", "unreadable", file, CONFIG_FILE, f"byte 0x{content[error.start]:02x}", "UTF-8 text",
            "save it as UTF-8", line,
        )  # fmt: skip
        return None


def _tensors(root: Message, kind: str) -> dict[str, Tensor]:
    found = {}
    for entry in root.messages(kind):
        name, data_type, optional = entry.value("name"), entry.value("data_type"), entry.value("optional")
        if name is None:
            continue
        type_ = None if data_type is None or data_type.is_placeholder else data_type.text.removeprefix("TYPE_")
        is_optional = optional is not None and optional.text.lower() in ("true", "t", "1")
        found[name.text] = Tensor(name.text, type_, len(entry.values("dims")), is_optional, name.line)
    return found


def _role(model: TritonModel) -> Role:
    """By platform, files and backend where they say it, and else by the tensors and parameters that it has."""
    platform = model.root.value("platform")
    if model.root.message("ensemble_scheduling") or (platform and platform.text == "ensemble"):
        return "ensemble"
    if any((version / LLMAPI_FILE).is_file() for version in model.versions):
        return "llmapi"
    if any(name.startswith("sampling_param_") for name in model.inputs):
        return "llmapi"
    if model.backend == "tensorrtllm":
        return "tensorrt_llm"
    if "engine_dir" in model.parameters and "input_ids" in model.inputs and "gpt_model_type" not in model.parameters:
        return "gpt"
    scores: dict[Role, int] = {role: _score(model, role) for role in _SCORED}
    best = max(scores, key=lambda role: scores[role])
    return best if scores[best] else "other"


def _score(model: TritonModel, role: Role) -> int:
    """How many of the role's names it has, and has as nothing else has them."""
    parameters: Mapping[str, object] = PARAMETERS.get(role, {})
    names = sum(name in parameters or (role == "tensorrt_llm" and name in RENAMED) for name in model.parameters)
    tensors = sum(name in INPUTS[role] for name in model.inputs) + sum(name in OUTPUTS[role] for name in model.outputs)
    return 3 * tensors + names
