"""`trtbuild package` of a TensorRT-LLM engine: its five models, checked, and put in place one by one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trtbuild import __version__
from trtbuild.engines.passport import Passport, verified_digest
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import refuse_all
from trtbuild.progress import ProgressFactory
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.tensorrt_llm.check import TrtllmCheck, check_repository
from trtbuild.triton_repo.tensorrt_llm.names import ModelNames
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import ENGINE, repository_facts, write_repository
from trtbuild.triton_repo.tensorrt_llm.tensors import ModelRole
from trtbuild.workspace import PACKAGE_RECORD, Workspace, locked, read_json, replace_directory, sync, write_json

BUILDER = "tensorrt-llm"
_FORMAT = 1
# What others ask comes before them.
_ORDER: tuple[ModelRole, ...] = ("tensorrt_llm", "preprocessing", "postprocessing", "tensorrt_llm_bls", "ensemble")


@dataclass(frozen=True)
class TrtllmPackaging:
    """`prefix`: of the models' names; None: upstream's names, or the engine's own where several are packaged.

    `engine_path`: where Triton's process finds the engine, if not in the repository's place on this machine.
    """

    options: TrtllmOptions = field(default_factory=TrtllmOptions)
    prefix: str | None = None
    engine_path: str | None = None

    def prefix_for(self, passport: Passport, num_engines: int) -> str | None:
        return passport.name if num_engines > 1 else self.prefix


def check_trtllm(place: Workspace, passport: Passport, packaging: TrtllmPackaging, prefix: str | None) -> None:
    """Raises `Refused` for what can be refused before anything is written."""
    passport.check_accuracy()
    engine = TrtllmEngine.open(passport.directory)
    repository_facts(
        passport, engine, packaging.options, final=place.models, prefix=prefix, engine_path=packaging.engine_path
    )
    refuse_all(f"package {passport.name}", _taken(place, passport, ModelNames(prefix)))


def package_trtllm(
    place: Workspace,
    passport: Passport,
    packaging: TrtllmPackaging,
    prefix: str | None,
    installation: TritonInstallation | None,
    progress: ProgressFactory,
) -> tuple[list[str], TrtllmCheck]:
    """The names of the models, and what was checked of them; see `package.package_engines`."""
    names = ModelNames(prefix)
    final = place.models / names["tensorrt_llm"]
    place.models.mkdir(parents=True, exist_ok=True)
    staging = place.packages_staging.absolute() / passport.name
    locks = place.models.parent
    with (
        locked(locks / f".{passport.name}.lock", final),
        locked(locks / f".models-{names['tensorrt_llm']}.lock", final),
    ):
        refuse_all(f"package {passport.name}", _taken(place, passport, names))
        shutil.rmtree(staging, ignore_errors=True)
        write_repository(
            staging, passport, TrtllmEngine.open(passport.directory), packaging.options, final=place.models,
            prefix=prefix, engine_path=packaging.engine_path,
        )  # fmt: skip
        # Again here: the files are those that will be served.
        Passport.open(staging / names["tensorrt_llm"] / "1" / ENGINE).check_files()
        _write_records(staging, passport, names)
        checked = check_repository(staging, names, installation, progress)
        for role in _ORDER:
            _publish(staging / names[role], place.models / names[role])
        shutil.rmtree(staging)
    return [names[role] for role in _ORDER], checked


def _publish(model: Path, final: Path) -> None:
    for path in model.rglob("*"):
        sync(path)
    replace_directory(model, final, model.with_name(f"{model.name}.old"))


def _write_records(staging: Path, passport: Passport, names: ModelNames) -> None:
    record = {
        "format": _FORMAT,
        "trtbuild": __version__,
        "engine": passport.name,
        "engine_digest": verified_digest(passport.data),
        "models": [names[role] for role in _ORDER],
    }
    for name in names.values():
        write_json(staging / name / PACKAGE_RECORD, record)


def _taken(place: Workspace, passport: Passport, names: ModelNames) -> Iterator[str]:
    """Names that another engine's models have, or somebody's own."""
    for name in names.values():
        model = place.models / name
        if not model.exists():
            continue
        record = model / PACKAGE_RECORD
        owner = read_json(record)["engine"] if record.is_file() else None
        if owner != passport.name:
            whose = f"of the engine {owner}" if owner else "not one of ours"
            yield f"{model} is there already and {whose}; give this engine's models names: --prefix {passport.name}"


def describe_check(names: Sequence[str], check: TrtllmCheck) -> str:
    """For a person: what was seen, and what was not."""
    if check.triton is None:
        seen = f"{len(names)} config.pbtxt parsed by Triton's protobuf; no Triton here loaded the Python models"
    else:
        seen = (
            f"{len(names)} config.pbtxt parsed; Triton ({check.triton}) loaded preprocessing and postprocessing, which "
            f"did as the tokenizer does ({check.num_prompt_tokens} tokens and back)"
        )
    return f"  {seen}\n  NOT CHECKED: {check.not_checked}"
