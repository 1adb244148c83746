"""The TensorRT-LLM models of a Triton repository, with the engines behind them, as launching needs to know them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.engines.tensorrt_llm.engine_config import ENGINE_CONFIG, TrtllmEngine, engine_file
from trtbuild.errors import CheckpointError, Refused

BACKEND = "tensorrtllm"
# Where `package` puts the engine of a repository that carries it; the path inside a container may be another.
_OWN_ENGINE = Path("1") / "engine"
_Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TrtllmModel:
    """A model of the C++ backend; `gpu_device_ids` and `participant_ids` have a group for each instance, or none."""

    name: str
    engine: TrtllmEngine
    num_instances: int = 1
    gpu_device_ids: _Groups = ()
    participant_ids: _Groups = ()

    @property
    def world_size(self) -> int:
        return self.engine.world_size

    @property
    def gpus_per_node(self) -> int:
        """A rank takes the GPU that is at its number, modulo this, in gpu_device_ids, or of its machine."""
        if self.gpu_device_ids:
            return len(self.gpu_device_ids[0])
        return int((self.engine.model.get("mapping") or {}).get("gpus_per_node") or 8)


def has_trtllm_models(repository: Path, names: Iterable[str] | None = None) -> bool:
    """Whether a model of the repository (of `names`) is the C++ backend's; for a quick choice, so only by its text."""
    wanted = None if names is None else set(names)
    files = (file for file in repository.glob("*/config.pbtxt") if wanted is None or file.parent.name in wanted)
    return any(re.search(rf'\bbackend\s*:\s*"{BACKEND}"', file.read_text(errors="replace")) for file in files)


def read_trtllm_models(repository: Path, names: Iterable[str]) -> tuple[TrtllmModel, ...]:
    """Of the models `names`, those of TensorRT-LLM's C++ backend, by name.

    Raises `Refused` for a config.pbtxt that cannot be served, `CheckpointError` for a damaged engine directory.
    """
    found: list[TrtllmModel] = []
    for name in sorted(names):
        config = _read_config(repository / name / "config.pbtxt")
        if config.backend == BACKEND:
            found.append(_read_model(repository / name, config))
    return tuple(found)


def _read_config(file: Path) -> Any:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise Refused(f"{file} cannot be read ({error}); pip install 'trtbuild[serve]'") from error
    protobuf: Any = model_config_pb2
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), protobuf.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise Refused(
            f"{file}: Triton cannot parse it ({error}); a ${{placeholder}} that was left does that. "
            "trtbuild migrate lists them, trtbuild package writes the file anew"
        ) from error


def _read_model(directory: Path, config: Any) -> TrtllmModel:
    parameters = {key: value.string_value for key, value in config.parameters.items()}
    engine = TrtllmEngine.open(_engine_directory(directory, parameters.get("gpt_model_path", "")))
    _check_engine(engine)
    return TrtllmModel(
        directory.name, engine,
        num_instances=sum(max(1, group.count) for group in config.instance_group) or 1,
        gpu_device_ids=_groups(directory, parameters, "gpu_device_ids"),
        participant_ids=_groups(directory, parameters, "participant_ids"),
    )  # fmt: skip


def _engine_directory(directory: Path, path: str) -> Path:
    """Where config.pbtxt says it is, which may be a path inside a container; else the model's own."""
    file = directory / "config.pbtxt"
    if "${" in path:
        raise Refused(f"{file}: gpt_model_path is still the placeholder {path}; put the engine's directory there")
    for candidate in ([Path(path)] if path else []) + [directory / _OWN_ENGINE]:
        if (candidate / ENGINE_CONFIG).is_file():
            return candidate
    raise Refused(
        f"{file}: gpt_model_path is {path or 'empty'}, and there is no engine ({ENGINE_CONFIG}) there, nor in "
        f"{directory / _OWN_ENGINE}; mount it at that path, or package the engine again"
    )


def _check_engine(engine: TrtllmEngine) -> None:
    mapping = engine.model.get("mapping") or {}
    cp = int(mapping.get("cp_size") or 1)
    if engine.tp * engine.pp * cp != engine.world_size:
        raise CheckpointError(
            f"{engine.directory / ENGINE_CONFIG}: world_size {engine.world_size}, but tp {engine.tp} x pp {engine.pp} "
            f"x cp {cp}; build the engine again"
        )
    missing = [
        file for rank in range(engine.world_size) if not (engine.directory / (file := engine_file(rank))).is_file()
    ]
    if missing:
        raise CheckpointError(
            f"{engine.directory}: {', '.join(missing)} of {engine.world_size} ranks missing; copy the whole directory, "
            "or build the engine again"
        )


def _groups(directory: Path, parameters: dict[str, str], name: str) -> _Groups:
    """ "0,1;2,3" as the backend reads it; a placeholder counts as unset there."""
    text = parameters.get(name, "").strip()
    if not text or "${" in text:
        return ()
    try:
        return tuple(tuple(int(part) for part in group.split(",")) for group in text.split(";") if group.strip())
    except ValueError as error:
        raise Refused(
            f"{directory / 'config.pbtxt'}: {name} is {text!r}; it is whole numbers with commas, a semicolon between "
            'instances, such as "0,1;2,3"'
        ) from error
