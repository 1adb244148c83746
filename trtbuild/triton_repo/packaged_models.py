"""Which models of a repository belong together, by trtbuild.json, and which of them a name to `serve` means."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.installation import PATHS_VARIABLE, TritonInstallation
from trtbuild.workspace import PACKAGE_RECORD, read_json

LLMAPI_KIND = "llmapi"
_BLS = "tensorrt_llm_bls"
# Where the container's own Python has its packages, whichever Python trtbuild runs in.
_CONTAINER, _PACKAGES = Path("/usr/local/lib"), "python3*/dist-packages"


@dataclass(frozen=True)
class PackagedModel:
    """A model directory; `engine` "" and `models` empty for one that trtbuild did not package."""

    name: str
    engine: str = ""
    models: tuple[str, ...] = ()
    kind: str = ""

    @classmethod
    def read(cls, directory: Path) -> PackagedModel:
        if not (directory / PACKAGE_RECORD).is_file():
            return cls(directory.name)
        record = read_json(directory / PACKAGE_RECORD)
        return cls(directory.name, record["engine"], tuple(record.get("models", ())), record.get("kind", ""))

    @property
    def prefix(self) -> str | None:
        """Of a TensorRT-LLM engine's five models, "" for upstream's own names; None for models of another kind."""
        bls = next((name for name in self.models if name.endswith(_BLS)), None)
        return bls.removesuffix(_BLS).removesuffix("_") if bls is not None and len(self.models) == 5 else None


def resolve_names(repository: Path, names: Sequence[str]) -> list[str]:
    """The models that `names` mean, sorted; of a TensorRT-LLM engine always all five, which need each other.

    A name is a model's, a prefix or an engine's. Raises `Refused` listing the engines that are there.
    """
    found = [PackagedModel.read(file.parent) for file in sorted(repository.glob("*/config.pbtxt"))]
    chosen: set[str] = set()
    problems: list[str] = []
    for name in names:
        meant = [model for model in found if name in (model.name, model.engine, model.prefix or None)]
        chosen |= {model.name for model in meant}
        for model in meant:
            chosen |= set(model.models) if model.prefix is not None else set()
        problems += [] if meant else [f"{name}: not in {repository}; there: {', '.join(_engines(found))}"]
    refuse_all("serve", problems)
    return [model.name for model in found if model.name in chosen]


def _engines(found: Iterable[PackagedModel]) -> list[str]:
    """One entry for each package: its engine, with the prefix where it has another name."""
    texts = [
        f"{model.engine} (as {model.prefix}_...)" if model.prefix not in (None, "", model.engine)
        else model.engine or model.name
        for model in found
    ]  # fmt: skip
    return list(dict.fromkeys(texts))


def check_llmapi(repository: Path, models: Sequence[str], installation: TritonInstallation) -> None:
    """Raises `Refused` for models over TensorRT-LLM's LLM API where the server's Python has no TensorRT-LLM."""
    named = [name for name in models if PackagedModel.read(repository / name).kind == LLMAPI_KIND]
    if named and not _has_tensorrt_llm(installation):
        raise Refused(
            f"serve: {', '.join(named)} run over TensorRT-LLM's LLM API, and {installation.source}'s Triton finds no "
            "tensorrt_llm here: serve in an NGC container with TensorRT-LLM 1.3 or later "
            "(nvcr.io/nvidia/tritonserver:YY.MM-trtllm-python-py3), or name other models to serve"
        )


def _has_tensorrt_llm(installation: TritonInstallation) -> bool:
    spec = importlib.util.find_spec("tensorrt_llm")
    # A folder of that name is found too, without an origin.
    if spec is not None and spec.origin is not None:
        return True
    listed = f"{installation.environment.get(PATHS_VARIABLE, '')}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    folders = [*filter(None, listed.split(os.pathsep)), *_CONTAINER.glob(_PACKAGES)]
    return any((Path(folder) / "tensorrt_llm" / "__init__.py").is_file() for folder in folders)
