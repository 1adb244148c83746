"""A rank checkpoint of any layout becomes a Hugging Face checkpoint that other engines load, its codes as they are."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from trtbuild import __version__
from trtbuild.checkpoints.content import Digest
from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.hub_formats.config import KEYS
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint, verify_content, weights_digest
from trtbuild.checkpoints.source import COMPANION_FILES, LEGAL_FILES
from trtbuild.checkpoints.source_files import CONFIG_FILE, read_json
from trtbuild.engines.export import compressed_tensors, modelopt
from trtbuild.engines.export.modules import ModuleList
from trtbuild.engines.export.tensors import NOT_IN_TENSORRT_LLM, TENSORRT_LLM, ExportPlan
from trtbuild.engines.export.writer import MAX_SHARD_BYTES, cut_into_files, write_files
from trtbuild.errors import Refused
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import REQUEST_FILE, staged, write_json

SchemeName = Literal["compressed-tensors", "modelopt"]
SCHEMES: tuple[SchemeName, ...] = get_args(SchemeName)
# Where the export came from, beside its config.json.
RECORD = "trtbuild-export.json"
_LAY_OUT = {"compressed-tensors": compressed_tensors.lay_out, "modelopt": modelopt.lay_out}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_READABLE_DIALECT = "tensorrt-rtx"


@dataclass(frozen=True)
class Companions:
    """Where config.json, tokenizer, licence and the like are: a checkpoint, or an engine's folders."""

    directories: tuple[Path, ...]

    def find(self, name: str) -> Path | None:
        """The first file of this name."""
        return next((folder / name for folder in self.directories if (folder / name).is_file()), None)


@dataclass(frozen=True)
class Exported:
    """What an export is; `written` is False where it was there already."""

    directory: Path
    scheme: SchemeName | None
    precision: str
    num_files: int
    num_bytes: int
    loads_in: tuple[str, ...]
    notes: tuple[str, ...]
    written: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"directory": str(self.directory)}


def export_checkpoint(
    checkpoint: RankCheckpoint,
    companions: Companions,
    directory: Path,
    scheme: SchemeName = "compressed-tensors",
    *,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: ProgressFactory = no_progress,
) -> Exported:
    """Write `directory`; one that is there for the same request is left as it is.

    Raises Refused for what the scheme cannot hold, CheckpointError for a rank file whose content has changed.
    """
    _check_dialect(checkpoint)
    config = _read_source_config(checkpoint, companions)
    plan = _for_its_engines(_LAY_OUT[scheme](ModuleList(checkpoint)), checkpoint)
    files = cut_into_files(plan.tensors, max_shard_bytes)
    request = {
        "format": 1,
        "weights": weights_digest(checkpoint),
        "scheme": scheme,
        "companions": _companions_digest(companions),
        "max_shard_bytes": max_shard_bytes,
    }
    _check_target(directory)
    num_bytes = sum(tensor.spec.num_bytes for tensor in plan.tensors)
    with staged(directory.absolute(), request, force=force) as partial:
        if partial is not None:
            with progress("checking the rank files", 1):
                verify_content(checkpoint)
            with progress("exporting", num_bytes / 2**20, "MiB") as bar:
                write_files(partial, files, bar.advance)
            _copy_companions(companions, partial)
            _write_configs(partial, checkpoint, config, plan, scheme)
    used = scheme if plan.quantization else None
    return Exported(
        directory, used, checkpoint.precision.weights, len(files), num_bytes, plan.loads_in, plan.notes,
        written=partial is not None,
    )  # fmt: skip


def _for_its_engines(plan: ExportPlan, checkpoint: RankCheckpoint) -> ExportPlan:
    """Without the engines that do not have the model itself."""
    if checkpoint.config.architecture not in NOT_IN_TENSORRT_LLM:
        return plan
    return replace(plan, loads_in=tuple(engine for engine in plan.loads_in if engine != TENSORRT_LLM))


def _check_dialect(checkpoint: RankCheckpoint) -> None:
    dialect = checkpoint.authority.get("dialect")
    if dialect != _READABLE_DIALECT and checkpoint.precision.is_quantized:
        model = checkpoint.authority["source"]["model"]
        raise Refused(
            f"{checkpoint.directory} holds its weights in the dialect of {dialect}; export the model itself: trtbuild "
            f"export {model} --precision {checkpoint.precision.weights}"
        )


def _check_target(directory: Path) -> None:
    if directory.exists() and not (directory / REQUEST_FILE).is_file():
        raise Refused(f"{directory} is there and is no export of ours; choose another directory with -o")


def _read_source_config(checkpoint: RankCheckpoint, companions: Companions) -> dict[str, Any]:
    """The source's config.json, as long as it is the one that the weights were converted by."""
    file = companions.find(CONFIG_FILE)
    if file is None:
        raise Refused(
            f"{checkpoint.directory.name}: its source has no config.json any more; say where it is by --source"
        )
    config = read_json(file.parent, CONFIG_FILE)
    found, wanted = read_config(config).to_dict(), checkpoint.config.to_dict()
    differing = sorted(key for key in wanted if found.get(key) != wanted[key])
    if differing:
        raise Refused(
            f"{file}: {', '.join(differing)} differ from what {checkpoint.directory.name} was converted by; say with "
            "--source where that checkpoint is, or convert it again with --force"
        )
    return config


def _copy_companions(companions: Companions, target: Path) -> None:
    """Tokenizer, generation config, chat template; model card and licence."""
    for name in (*COMPANION_FILES, *LEGAL_FILES):
        file = companions.find(name)
        if file is not None:
            shutil.copyfile(file, target / name)


def _companions_digest(companions: Companions) -> str:
    digest = Digest()
    for name in (CONFIG_FILE, *COMPANION_FILES, *LEGAL_FILES):
        file = companions.find(name)
        if file is not None:
            digest.update(name.encode())
            digest.update(file.read_bytes())
    return digest.hex()


def _write_configs(
    target: Path, checkpoint: RankCheckpoint, config: dict[str, Any], plan: ExportPlan, scheme: SchemeName
) -> None:
    """config.json last but one: without it no engine takes the directory for a model."""
    config = {key: value for key, value in config.items() if key not in KEYS}
    names = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    config |= dict.fromkeys(names, _DTYPES[checkpoint.precision.dtype])
    if plan.quantization is not None:
        config["quantization_config"] = plan.quantization
    for name, content in plan.files.items():
        write_json(target / name, content)
    source = checkpoint.authority["source"]
    record = {
        "trtbuild": __version__,
        "source": {key: source.get(key) for key in ("model", "revision", "digest")},
        "precision": checkpoint.precision.to_dict(),
        "command": checkpoint.authority.get("command"),
        "scheme": scheme if plan.quantization else None,
        "loads_in": list(plan.loads_in),
        "notes": [*(checkpoint.authority.get("notes") or []), *plan.notes],
    }
    write_json(target / RECORD, record)
    write_json(target / CONFIG_FILE, config)
