"""`trtbuild package`: Triton models of compiled engines, checked by a real Triton before anybody else sees them.

    triton_repo/models/NAME/         config.pbtxt, trtbuild.json, 1/model.py, 1/engine/ (hard links)
    triton_repo/models/NAME-unary/   config.pbtxt, 1/model.py
    triton_repo/models/NAME-tokens/  config.pbtxt, 1/model.py

A package is laid out in triton_repo/.staging/NAME, which is a model repository of its own, checked there, and then
swapped in, one directory and one step at a time; the engine comes first, and the others hold nothing of it.
An engine that TensorRT-LLM built becomes five models of its own kind: `trtbuild.triton_repo.tensorrt_llm.package`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from trtbuild import __version__
from trtbuild.checkpoints.source_files import CONFIG_FILE
from trtbuild.containers import release_of
from trtbuild.engines.passport import PASSPORT, Passport, verified_digest
from trtbuild.errors import Refused, refuse_all
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.triton_repo.check import CheckResult, check_package
from trtbuild.triton_repo.installation import TritonInstallation
from trtbuild.triton_repo.model_config import WorkerSettings, config_text
from trtbuild.triton_repo.tensorrt_llm.check import TrtllmCheck
from trtbuild.triton_repo.tensorrt_llm.option_texts import check_single_engine
from trtbuild.triton_repo.tensorrt_llm.package import (
    BUILDER,
    TrtllmPackaging,
    check_trtllm,
    describe_check,
    package_trtllm,
)
from trtbuild.triton_repo.tensorrt_llm.repository import link_tree
from trtbuild.triton_repo.tensors import TOKENS_SUFFIX, UNARY_SUFFIX, ModelKind, model_name
from trtbuild.workspace import (
    PACKAGE_RECORD,
    Workspace,
    check_name,
    locked,
    read_json,
    replace_directory,
    sync,
    write_json,
)

_FORMAT = 1
_MODEL_FILE = '''"""Triton loads this file; the model is trtbuild's, which must be installed where Triton runs."""

import os
import sys

# `trtbuild serve` says where trtbuild is; in a container it is where Triton's Python looks anyway.
sys.path.extend(filter(None, os.environ.get("TRTBUILD_PYTHONPATH", "").split(os.pathsep)))

from trtbuild.triton_repo.python_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True)
class Packaged:
    """What `package_engine` made; `check` is None where it was skipped, `warning` what the passport says."""

    name: str
    models: list[str]
    directory: Path
    warning: str | None
    check: CheckResult | TrtllmCheck | None
    release: str | None = None
    """Of TensorRT-LLM, where it built the engine."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "models": self.models,
            "directory": str(self.directory),
            "warning": self.warning,
            "check": None if self.check is None else self.check.to_dict(),
        }


def package_engines(
    place: Workspace,
    names: Sequence[str],
    settings: WorkerSettings,
    *,
    alias: str | None = None,
    installation: TritonInstallation | None,
    progress: ProgressFactory = no_progress,
    trtllm: TrtllmPackaging | None = None,
) -> list[Packaged]:
    """Package every engine, or refuse before the first is begun. `installation` None: without the check.

    `alias`: one more name for the text model, for clients that know another one. `trtllm` is for engines that
    TensorRT-LLM built, and `settings` and `alias` for the others. Raises `Refused`, and `CheckFailed`
    where Triton does not answer as the engine does; the repository then has what it had before.
    """
    passports = open_engines(place, names)
    own = [passport for passport in passports if passport.builder_name != BUILDER]
    foreign = [passport for passport in passports if passport.builder_name == BUILDER]
    _check_kinds(own, foreign, settings, alias, trtllm)
    packaging = trtllm or TrtllmPackaging()
    prefixes = {passport.name: packaging.prefix_for(passport, len(foreign)) for passport in foreign}
    _check_requests(place, own, alias)
    for passport in foreign:
        check_trtllm(place, passport, packaging, prefixes[passport.name])
    found = [_package(place, passport, settings, alias, installation, progress) for passport in own]
    for passport in foreign:
        models, check = package_trtllm(place, passport, packaging, prefixes[passport.name], installation, progress)
        warning, release = passport.check_accuracy(), passport.data["builder"].get("version")
        found.append(Packaged(passport.name, models, place.models / models[0], warning, check, release))
    return found


def open_engines(place: Workspace, names: Sequence[str]) -> list[Passport]:
    """Each once. Raises `Refused` where a name is a Hugging Face directory, `CheckpointError` where it is nothing."""
    for name in names:
        if not (place.engines / name / PASSPORT).is_file() and (Path(name) / CONFIG_FILE).is_file():
            raise Refused(
                f"{name} is a directory with a checkpoint, and package takes engines: trtbuild package {name} --llmapi "
                f"is for TensorRT-LLM 1.3 and later, trtbuild compile {name} makes an engine"
            )
    return [Passport.open(place.engine(name)) for name in dict.fromkeys(names)]


def _check_kinds(
    own: Sequence[Passport],
    foreign: Sequence[Passport],
    settings: WorkerSettings,
    alias: str | None,
    trtllm: TrtllmPackaging | None,
) -> None:
    """Options of the one kind of engine are not for the other."""
    if trtllm not in (None, TrtllmPackaging()) and not foreign:
        raise Refused("--trtllm, --prefix and --engine-path are for engines that TensorRT-LLM built")
    if not own and foreign and (settings != WorkerSettings() or alias is not None):
        raise Refused(
            "--slots, --max-queue, --executor, --dtype, --threads and --alias are for our own engine worker; an engine "
            "of TensorRT-LLM is told by --trtllm NAME=VALUE, and named by --prefix"
        )
    if trtllm is not None:
        check_single_engine(trtllm.prefix, trtllm.engine_path, len(foreign))


def _check_requests(place: Workspace, passports: list[Passport], alias: str | None) -> None:
    problems: list[str] = []
    for passport in passports:
        passport.check_runnable()
        passport.check_accuracy()
        if not any(passport.tokenizer_directory.glob("tokenizer*")):
            problems.append(f"{passport.name}: has no tokenizer; compile it from a checkpoint that has one")
        if passport.name.endswith((UNARY_SUFFIX, TOKENS_SUFFIX)):
            problems.append(f"{passport.name}: names that end so are those of our second models; compile with --name")
    if alias is not None and passports:
        if len(passports) > 1:
            problems.append("--alias is one name for one engine; package the engines one by one")
        taken = place.models / check_name(alias)
        if taken.exists() and _alias_of(taken) != passports[0].name:
            problems.append(f"--alias {alias}: {taken} is there already")
    refuse_all("package", problems)


def _package(
    place: Workspace,
    passport: Passport,
    settings: WorkerSettings,
    alias: str | None,
    installation: TritonInstallation | None,
    progress: ProgressFactory,
) -> Packaged:
    name, final = passport.name, place.models / passport.name
    place.models.mkdir(parents=True, exist_ok=True)
    staging = place.packages_staging.absolute() / name
    with locked(place.models.parent / f".{name}.lock", final):
        shutil.rmtree(staging, ignore_errors=True)
        models = _lay_out(staging, passport, settings, alias)
        # Again here: the files are those that will be served.
        Passport.open(staging / name / "1" / "engine").check_files()
        check = None
        if installation is not None:
            check = check_package(staging, name, settings, installation, progress)
        for model in models:
            for path in (staging / model).rglob("*"):
                sync(path)
            replace_directory(staging / model, place.models / model, staging / f"{model}.old")
        shutil.rmtree(staging)
    return Packaged(name, models, final, passport.check_accuracy(), check)


def _lay_out(staging: Path, passport: Passport, settings: WorkerSettings, alias: str | None) -> list[str]:
    """The model directories; their names, the engine's first."""
    name, batch = passport.name, passport.limits.max_batch_size
    kinds: list[tuple[str, ModelKind]] = [(model_name(name, kind), kind) for kind in ("text", "unary", "tokens")]
    if alias is not None:
        kinds.append((alias, "text"))
    for model, kind in kinds:
        version = staging / model / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(_MODEL_FILE, encoding="utf-8")
        text = config_text(name, kind, batch, settings, as_name=model)
        (staging / model / "config.pbtxt").write_text(text, encoding="utf-8")
    link_tree(passport.directory, staging / name / "1" / "engine")
    record = {
        "format": _FORMAT,
        "trtbuild": __version__,
        "engine": name,
        "engine_digest": verified_digest(passport.data),
        "models": [model for model, _ in kinds],
    }
    for model, _ in kinds:
        write_json(staging / model / PACKAGE_RECORD, record)
    return [model for model, _ in kinds]


def print_packaged(packaged: Sequence[Packaged]) -> None:
    releases = {one.name: one.release for one in packaged if one.release}
    if len(set(map(release_of, releases.values()))) > 1:
        listed = ", ".join(f"{name} ({release})" for name, release in releases.items())
        click.echo(f"warning: engines of several TensorRT-LLM releases, {listed}: no server serves both", err=True)
    for one in packaged:
        if one.warning is not None:
            click.echo(f"warning: {one.warning}", err=True)
        click.echo(f"{one.directory}: models {', '.join(one.models)}")
        where = ", in a container with its release (--dry-run prints the command)" if one.release else ""
        click.echo(f"  next: trtbuild serve {one.models[0]}{where}")
        if isinstance(one.check, TrtllmCheck):
            click.echo(describe_check(one.models, one.check))
        elif one.check is not None:
            check = one.check
            click.echo(
                f"  Triton ({check.triton}) answers as the engine does: {check.num_tokens} tokens by the "
                f"{check.executor} executor on {check.device}; {check.triton_ms_per_token} ms per token through "
                f"Triton, {check.engine_ms_per_token} ms without"
            )


def _alias_of(model: Path) -> str | None:
    return read_json(model / PACKAGE_RECORD)["engine"] if (model / PACKAGE_RECORD).is_file() else None
