"""Which release serves the repository, and whether its engines are of it."""

from __future__ import annotations

from collections.abc import Mapping

from trtbuild.containers import container_for, containers, containers_with, find_installed, release_of
from trtbuild.engines.tensorrt_llm.machine import RELEASES
from trtbuild.errors import Refused
from trtbuild.migrate.engine_facts import EngineFacts
from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import TritonModel
from trtbuild.migrate.release import Release


def serving_release(release: str | None, container: str | None) -> Release | None:
    """The one that the user names, or the one that is installed here; None where there is neither.

    Raises `Refused` on a release that is none, and on a container that is not in our table.
    """
    if container is not None:
        rows = containers_with(tag=container)
        if not rows:
            raise Refused(f"--container {container}: not in the table; there: {', '.join(c.tag for c in containers())}")
        return Release.parse(rows[0].tensorrt_llm)
    if release is not None:
        parsed = Release.parse(release)
        if parsed is None:
            raise Refused(f"--release {release}: must be a version of TensorRT-LLM, such as 1.2.1")
        return parsed
    return Release.parse(find_installed().tensorrt_llm)


def check_releases(
    engines: Mapping[str, tuple[TritonModel, EngineFacts]], serving: Release | None, findings: Findings
) -> None:
    """Engines run in the release that built them only, so all of a repository are of one."""
    releases = [engine.release for _, engine in engines.values() if engine.release is not None]
    newest = release_of(max(releases, key=lambda release: release.numbers).text) if releases else None
    for model, engine in engines.values():
        line = model.line_of("gpt_model_path")
        if engine.is_old:
            continue
        if engine.release is None:
            findings.add(
                "warning", "version", model.file, "config.json: version", engine.version_text,
                "the release that built it",
                "what built it is not known; build it again if it does not load", line,
            )  # fmt: skip
        elif serving is not None and release_of(engine.release.text) != release_of(serving.text):
            findings.add(
                "error", "version", model.file, "config.json: version", engine.release, f"{serving}, which serves",
                _fix_of_release(engine.release, serving), line,
            )  # fmt: skip
        elif serving is None and release_of(engine.release.text) != newest:
            findings.add(
                "error", "versions", model.file, "config.json: version", engine.release,
                f"one release for all engines, and there are some of {newest}",
                "one server has one TensorRT-LLM: build all engines with the same", line,
            )  # fmt: skip


def _fix_of_release(built: Release, serving: Release) -> str:
    """An engine of one release that another is to serve: the container that runs it, or the way into the other."""
    home, last = container_for(built.text), Release.parse(RELEASES[-1])
    serve = f"serve it in {home.image}, or " if home else ""
    if ".".join(map(str, serving.minor)) in RELEASES:
        return f"{serve}build the engine again with {serving}"
    if last is not None and serving.minor > last.minor:
        return (
            f"{serve}serve its model without an engine, as {serving} has none any more: `trtbuild package --llmapi` "
            "takes the Hugging Face model, or what `trtbuild export NAME --scheme modelopt` wrote of it"
        )
    newest = containers_with(tensorrt_llm=RELEASES[-1])
    if newest and newest[0] != home:
        serve += f"build the engine again in a newer container such as {newest[0].image}"
    return (
        f"{serve.removesuffix(', or ')}: trtbuild builds engines of {RELEASES[0]} to {RELEASES[-1]}, not of {serving}"
    )
