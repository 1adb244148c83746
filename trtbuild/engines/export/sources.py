"""What `trtbuild export NAME_OR_MODEL` means: a rank checkpoint that is there, or one that is converted first."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.rank_checkpoint import AUTHORITY, RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.export.export import Companions
from trtbuild.engines.passport import MODEL_CARD_DIRECTORY, PASSPORT, TOKENIZER_DIRECTORY, Passport
from trtbuild.errors import Refused
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import Workspace

# Flags that say how something is converted: of what is converted already they would be ignored.
_HOW = "--precision, --tp and the like say how a MODEL is converted"


def open_origin(
    place: Workspace,
    name: str,
    flags: dict[str, Any],
    *,
    moved: str | None = None,
    convert: Callable[[], tuple[RankCheckpoint, Path]],
    progress: ProgressFactory = no_progress,
) -> tuple[RankCheckpoint, Companions]:
    """The rank checkpoint behind NAME (build/NAME, or engines/NAME), or what `convert` makes of the model `name`.

    `convert` gives the checkpoint and its model's directory. `flags` are those of a conversion that were given;
    `moved` says where the source of NAME is now. Raises Refused where NAME and they contradict each other.
    """
    built, engine = place.build / name, place.engines / name
    is_name = "/" not in name and ((built / AUTHORITY).is_file() or (engine / PASSPORT).is_file())
    if not is_name:
        if moved is not None:
            raise Refused(f"--source says where the source of a NAME in build/ is now; {name!r} is none")
        checkpoint, directory = convert()
        return checkpoint, Companions((directory,))
    if flags:
        given = ", ".join("--" + flag.replace("_", "-") for flag in flags)
        raise Refused(f"{given}: {name} is converted already ({_HOW}); leave it out, or name the model")
    if not (built / AUTHORITY).is_file() and not (engine / AUTHORITY).is_file():
        raise Refused(_no_weights(Passport.open(engine)))
    checkpoint = RankCheckpoint.open(built if (built / AUTHORITY).is_file() else engine)
    return checkpoint, _companions(place, checkpoint, engine, moved, progress)


def _no_weights(engine: Passport) -> str:
    """Why an engine without a rank checkpoint cannot be exported, and what can be."""
    model = engine.data["source"]["model"]
    precision = engine.data["recipe"].get("precision") or engine.precision.weights
    why = "was compiled without weights (--plan-only)"
    if engine.builder_name == "tensorrt-llm":
        why = "is an engine of TensorRT-LLM, whose weights nothing can read back"
    command = shlex.join(["trtbuild", "export", model, "--precision", precision])
    return f"{engine.directory} {why}; export its model: {command}"


def _companions(
    place: Workspace, checkpoint: RankCheckpoint, engine: Path, moved: str | None, progress: ProgressFactory
) -> Companions:
    """An engine carries them; else they are the source checkpoint's own."""
    if moved is None and (engine / TOKENIZER_DIRECTORY / "config.json").is_file():
        return Companions((engine / TOKENIZER_DIRECTORY, engine / MODEL_CARD_DIRECTORY))
    made_of = checkpoint.authority["source"]
    try:
        source = CheckpointSource.open(
            moved or made_of["model"], None if moved else made_of["revision"],
            weights=False, sources=place.sources, progress=progress,
        )  # fmt: skip
    except Refused as error:
        if moved is not None:
            raise
        raise Refused(f"{error.message}; --source says where the checkpoint is now") from error
    return Companions((source.directory,))
