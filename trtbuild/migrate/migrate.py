"""`trtbuild migrate`: what is wrong with a hand-filled repository, and the recipes of its engines."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckFailed, Refused
from trtbuild.migrate.check_engine import EngineChecks, open_engine
from trtbuild.migrate.check_files import check_files
from trtbuild.migrate.check_parameters import check_parameters
from trtbuild.migrate.check_release import check_releases, serving_release
from trtbuild.migrate.check_tensors import check_tensors
from trtbuild.migrate.check_tokenizer import check_tokenizer
from trtbuild.migrate.check_wiring import check_wiring
from trtbuild.migrate.engine_facts import EngineFacts
from trtbuild.migrate.findings import SEVERITIES, Finding, Findings, plural
from trtbuild.migrate.model_guess import find_model
from trtbuild.migrate.models import Repository, TritonModel, read_repository
from trtbuild.migrate.package_options import PackageOptions, package_options
from trtbuild.migrate.paths import Places
from trtbuild.migrate.recipe_writer import RecipeDraft, draft_recipe
from trtbuild.migrate.release import Release
from trtbuild.migrate.scripts import check_scripts, world_size_of_scripts


@dataclass(frozen=True)
class EngineMigration:
    """What becomes of one `tensorrt_llm` model."""

    model: str
    directory: Path
    version: str | None
    recipe: RecipeDraft
    options: PackageOptions

    @property
    def toml(self) -> str:
        """The recipe, with the options of `package` as comments."""
        built = f" (TensorRT-LLM {self.version})" if self.version else ""
        flags = [f"    --trtllm {shlex.quote(f'{name}={value}')}" for name, value in self.options.values.items()]
        header = [
            f"What {self.model} of the old repository was built from, as far as its engine tells{built}.",
            "trtbuild compile THIS_FILE, and then, with the repository's settings:",
            " \\\n".join(["  trtbuild package NAME", *flags]),
        ]
        header = [line for text in header for line in text.split("\n")]
        notes = [*self.recipe.notes, *self.options.notes]
        draft = RecipeDraft(self.recipe.fields, self.recipe.comments, self.recipe.trtllm, notes)
        return draft.toml(header)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model, "engine": str(self.directory), "version": self.version,
            "recipe": {**self.recipe.fields, **({"trtllm": self.recipe.trtllm} if self.recipe.trtllm else {})},
            "comments": self.recipe.comments, "notes": [*self.recipe.notes, *self.options.notes],
            "package_options": self.options.values,
            "toml": self.toml,
        }  # fmt: skip


@dataclass(frozen=True)
class Migration:
    repository: Path
    release: Release | None
    roles: dict[str, str]
    findings: list[Finding] = field(default_factory=list)
    engines: list[EngineMigration] = field(default_factory=list)

    def count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def engine(self, name: str | None) -> EngineMigration | None:
        """Of one model; without a name the only one there is. Raises `Refused` on a name that has none."""
        if name is None:
            return self.engines[0] if len(self.engines) == 1 else None
        found = next((engine for engine in self.engines if engine.model == name), None)
        if found is None:
            known = ", ".join(engine.model for engine in self.engines) or "none"
            raise Refused(f"--model {name}: no engine of this name was read; there: {known}")
        return found

    @property
    def why_no_recipe(self) -> str:
        """What is missing, where there are no `engines`."""
        if "tensorrt_llm" in self.roles.values():
            return "a recipe is read from an engine's config.json, and no engine could be read"
        return "no model of the repository runs an engine"

    def to_dict(self) -> dict[str, Any]:
        return {
            "repository": str(self.repository), "release": None if self.release is None else self.release.text,
            "models": self.roles, "counts": {severity: self.count(severity) for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
            "engines": [engine.to_dict() for engine in self.engines],
        }  # fmt: skip

    def check(self) -> None:
        """Raises `CheckFailed` where there are errors."""
        errors = self.count("error")
        if errors:
            raise CheckFailed(
                f"{self.repository}: {plural(errors, 'error')}, {'each ' if errors > 1 else ''}with its fix above"
            )


def migrate_repository(
    root: Path,
    *,
    mounts: Iterable[str] = (),
    release: str | None = None,
    container: str | None = None,
    world_size: int | None = None,
) -> Migration:
    """Read a repository and everything that it points at; nothing is changed.

    `mounts`: CONTAINER=HERE for paths that are elsewhere on this machine. `release` or `container`: what serves it
    (default: what is installed here, or else what built the engines). `world_size`: ranks that are started (default:
    what scripts beside the models say). Raises `Refused` where there is no repository.
    """
    findings = Findings()
    repository, places = read_repository(root, findings), Places.create(root, mounts)
    serving = serving_release(release, container)
    _report_layout(repository, findings)
    engines: dict[str, tuple[TritonModel, EngineFacts]] = {}
    for model in repository.of("tensorrt_llm"):
        engine = open_engine(model, places, findings)
        if engine is not None:
            engines[model.name] = (model, engine)
    target = serving or _release_of_engines(engines)
    check_files(repository, findings)
    for model in (model for model in repository.models if not model.is_broken):
        check_parameters(model, target, findings)
        check_tensors(model, target, findings)
        check_tokenizer(model, places, findings)
    check_wiring(repository, findings)
    check_releases(engines, serving, findings)
    ranks = world_size or (world_size_of_scripts(root) if len(engines) == 1 else None)
    wrong: dict[str, dict[str, str]] = {}
    for model, engine in (pair for pair in engines.values() if not pair[0].is_broken):
        checks = EngineChecks(model, engine, target, findings)
        checks.run(ranks)
        wrong[model.name] = checks.wrong
    check_scripts(root, findings)
    return Migration(
        root, target, {model.name: model.role for model in repository.models}, findings.sorted(),
        [_migrate_engine(repository, places, pair, wrong.get(pair[0].name, {})) for pair in engines.values()],
    )  # fmt: skip


def _release_of_engines(engines: dict[str, tuple[TritonModel, EngineFacts]]) -> Release | None:
    """The newest of them; engines of several releases are a finding of their own."""
    found = [engine.release for _, engine in engines.values() if engine.release is not None]
    return max(found, key=lambda release: release.numbers, default=None)


def _report_layout(repository: Repository, findings: Findings) -> None:
    for model in repository.of("llmapi"):
        findings.add(
            "info", "llmapi", model.file, "model.yaml", "a repository of the LLM API", "nothing: it has no engine",
            "nothing to migrate: TensorRT-LLM 1.3 and later serve it as it is",
        )  # fmt: skip
    for model in repository.of("gpt"):
        findings.add(
            "error", "gpt_layout", model.file, "engine_dir", "the old `gpt` layout", "inflight_batcher_llm",
            "it was deprecated, and batches nothing: `trtbuild package` writes the in-flight batching models",
        )  # fmt: skip
    if not any(repository.of(role) for role in ("tensorrt_llm", "llmapi", "gpt")):
        findings.add(
            "error", "no_engine_model", ".", "tensorrt_llm", "no model that runs an engine",
            'one with backend "tensorrtllm" or gpt_model_path',
            "give the repository that inflight_batcher_llm was copied to",
        )  # fmt: skip


def _migrate_engine(
    repository: Repository, places: Places, pair: tuple[TritonModel, EngineFacts], wrong: Mapping[str, str]
) -> EngineMigration:
    model, engine = pair
    named = [(m, text) for m in (*repository.of("preprocessing"), model) if (text := m.parameter("tokenizer_dir"))]
    tokenizer, directory = None, None
    if named:
        owner, tokenizer = named[0]
        directory = places.find(tokenizer, owner.versions[-1] if owner.versions else None)
    source = find_model(engine, tokenizer, directory)
    return EngineMigration(
        model.name, engine.directory, engine.version_text, draft_recipe(engine, source),
        package_options(repository, model, wrong),
    )  # fmt: skip
