"""A Hugging Face checkpoint: a local directory, or a hub id resolved through huggingface_hub's cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.checkpoints.content import file_fingerprint
from trtbuild.checkpoints.families import Family, family_of
from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.hub_formats.config import read_quantization
from trtbuild.checkpoints.hub_formats.modules import StoredModule, find_modules
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization
from trtbuild.checkpoints.known_models import FACTS, KNOWN_MODELS, bundled_directory, facts_directory
from trtbuild.checkpoints.lora import LoraAdapter, LoraDelta, merge_rows, tile_rows
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.safetensors_file import MappedTensors, TensorEntry, sampled_digest
from trtbuild.checkpoints.source_checks import check_weights
from trtbuild.checkpoints.source_files import CONFIG_FILE, INDEX_FILE, check_links, read_json, read_shards
from trtbuild.checkpoints.source_tensors import expected_shapes
from trtbuild.checkpoints.staging import fetch, staged_directory
from trtbuild.errors import CheckpointError, Refused
from trtbuild.object_store import is_url
from trtbuild.progress import ProgressFactory, no_progress
from trtbuild.workspace import digest_of

if TYPE_CHECKING:
    import torch

    from trtbuild.checkpoints.hub_formats.weights import ModuleReader
    from trtbuild.checkpoints.quantization import QuantizedWeight, StoredWeight

# What the engine needs besides the weights, where the checkpoint has it.
COMPANION_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
# Under what terms the model may be used and what it is for; whoever gets the engine must get these too.
LEGAL_FILES = (
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "NOTICE.txt", "Notice.txt",
    "USE_POLICY.md", "COPYRIGHT", "COPYRIGHT.txt",
)  # fmt: skip
_HUB_PATIENCE_S = 10
# Not every *.safetensors: some repositories ship the same weights twice, in the authors' own layout.
_HUB_PATTERNS = [CONFIG_FILE, INDEX_FILE, "model*.safetensors", *COMPANION_FILES, *LEGAL_FILES]


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint whose headers have been checked; weights are read on use.

    `model` is what the user named; `revision` is the hub commit that it resolved to, None for a directory.
    """

    model: str
    directory: Path
    revision: str | None = None
    adapters: tuple[LoraAdapter, ...] = ()

    @classmethod
    def open(
        cls,
        model: str,
        revision: str | None = None,
        *,
        weights: bool = True,
        sources: Path | None = None,
        progress: ProgressFactory = no_progress,
    ) -> CheckpointSource:
        """`model` is a known name, a local directory, a hub id or the URL of a directory in an object store.

        Without `weights` only its config is needed. What a URL names is fetched into a folder of `sources`.

        Raises CheckpointError or Refused with what was found and the fix, before any weight is read.
        """
        if is_url(model):
            directory, commit = _fetch(model, revision, weights, sources, progress), None
        else:
            directory, commit = _resolve(model, revision, weights=weights)
        check_links(directory, (CONFIG_FILE, INDEX_FILE, *COMPANION_FILES, *LEGAL_FILES))
        source = cls(model, directory, commit)
        _ = source.config
        if weights:
            _ = source.entries
        return source

    @property
    def has_built_in_config(self) -> bool:
        """Whether the config is our own record of a known model, which has no weights and no tokenizer."""
        return self.directory.parent == FACTS

    @cached_property
    def hf_config(self) -> dict[str, Any]:
        return read_json(self.directory, CONFIG_FILE)

    @cached_property
    def config(self) -> ModelConfig:
        return read_config(self.hf_config)

    @cached_property
    def family(self) -> Family:
        """With the names that the files have, if they are there."""
        family = family_of(self.config.architecture)
        if family.other_keys is None or not any(self.directory.glob("*.safetensors")):
            return family
        return family.as_spelled_in(self._shards)

    @cached_property
    def quantization(self) -> HubQuantization | None:
        """How config.json says that the checkpoint is quantized; None for a 16-bit one."""
        return read_quantization(self.hf_config)

    @cached_property
    def entries(self) -> dict[str, TensorEntry]:
        """Every tensor of every shard, checked against the index and against the shapes that the config implies."""
        modules = find_modules(self._shards, self._expected, self.quantization)
        check_weights(self.directory.name, self.config, self._shards, self._expected, modules)
        return self._shards

    @cached_property
    def _shards(self) -> dict[str, TensorEntry]:
        """Every tensor of every shard, checked against the index alone."""
        return read_shards(self.directory)

    @cached_property
    def _mapped(self) -> MappedTensors:
        return MappedTensors(self.entries)

    @cached_property
    def _modules(self) -> dict[str, StoredModule]:
        """The modules that are stored quantized, by canonical name."""
        found = find_modules(self.entries, self._expected, self.quantization)
        return {canonical: found[name] for canonical, name in self._names.items() if name in found}

    @cached_property
    def _reader(self) -> ModuleReader:
        import torch

        from trtbuild.checkpoints.hub_formats.weights import ModuleReader

        return ModuleReader(self._mapped, torch.float16 if self.config.dtype == "fp16" else torch.bfloat16)

    @cached_property
    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Name in the files -> shape of every weight in 16 bit."""
        return {self.family.source_name(name): shape for name, shape in expected_shapes(self.config).items()}

    def with_lora(self, adapters: Sequence[LoraAdapter]) -> CheckpointSource:
        """The same checkpoint with these adapters merged into whatever is read of it.

        Raises Refused or CheckpointError where an adapter does not fit.
        """
        if not adapters:
            return self
        if self.quantization is not None:
            raise Refused(
                f"--lora {adapters[0].directory}: {self.model} is quantized, and a merged weight would have to be "
                "quantized again; merge the adapter into the 16-bit model"
            )
        source = replace(self, adapters=(*self.adapters, *adapters))
        _ = source._deltas
        return source

    def portable(self) -> CheckpointSource:
        """A copy for another process on this file system: nothing is open in it, and paths are absolute."""
        adapters = tuple(replace(adapter, directory=adapter.directory.absolute()) for adapter in self.adapters)
        return replace(self, directory=self.directory.absolute(), adapters=adapters)

    @cached_property
    def _deltas(self) -> dict[str, list[LoraDelta]]:
        """What the adapters add, by the base weight's name in the file."""
        found: dict[str, list[LoraDelta]] = {}
        for adapter in self.adapters:
            for name, delta in adapter.deltas(self._expected).items():
                found.setdefault(name, []).append(delta)
        return found

    @cached_property
    def _names(self) -> dict[str, str]:
        return {canonical: self.family.source_name(canonical) for canonical in expected_shapes(self.config)}

    def tensor(self, canonical: str) -> torch.Tensor:
        """The weight behind a canonical name (see `families`): a view of the file, merged with its adapters, or, of a
        quantized one, dequantized in the model's 16-bit type.
        """
        if canonical in self._modules:
            return self._reader.tensor(self._modules[canonical])
        if self._names[canonical] in self._deltas:
            return self.rows(canonical, 0, self.shape(canonical)[0])
        return self._mapped.tensor(self._names[canonical])

    def rows(self, canonical: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the same."""
        if canonical in self._modules:
            return self._reader.rows(self._modules[canonical], start, stop)
        name = self._names[canonical]
        if name not in self._deltas:
            return self._mapped.rows(name, start, stop)
        num_rows, width = self.shape(canonical)
        base = self._mapped.rows(name, *tile_rows(width, start, stop, num_rows))
        return merge_rows(base, self._deltas[name], start, stop - start)

    def shape(self, canonical: str) -> tuple[int, ...]:
        """Shape of the weight behind a canonical name; of a quantized one, that of its values."""
        if canonical in self._modules:
            return self._modules[canonical].shape
        return self.entries[self._names[canonical]].spec.shape

    def stored(self, canonical: str) -> StoredWeight | None:
        """What is known of a weight that the checkpoint holds quantized; None for the others."""
        module = self._modules.get(canonical)
        return None if module is None else self._reader.stored(module)

    def stored_rows(self, canonical: str, start: int, stop: int) -> QuantizedWeight:
        """Rows start..stop of such a weight, as they are stored; KeyError for the others."""
        return self._reader.stored_rows(self._modules[canonical], start, stop)

    def digest_of(self, canonical: str) -> str | None:
        """Content digest of such a weight's tensors; None for the others."""
        module = self._modules.get(canonical)
        return None if module is None else self._reader.digest(module)

    def fingerprint(self) -> dict[str, Any]:
        """What tells, without reading the weights, whether any file was touched: `digest`, and the files' state."""
        files = sorted({entry.file for entry in self.entries.values()})
        states = {file.name: file_fingerprint(file) for file in files}
        states |= {f"lora{i}": adapter.fingerprint() for i, adapter in enumerate(self.adapters)}
        return {"digest": self.digest, "files": states}

    @cached_property
    def digest(self) -> str:
        """Identifies config.json, the adapters, and the weights as far as `sampled_digest` reads them."""
        config = (self.directory / CONFIG_FILE).read_bytes()
        has_weights = any(self.directory.glob("*.safetensors"))
        base = hashlib.sha256(config + (sampled_digest(self.entries) if has_weights else "").encode()).hexdigest()
        return digest_of([base, *(adapter.digest for adapter in self.adapters)]) if self.adapters else base

    @property
    def companions_digest(self) -> str:
        """Identifies tokenizer, chat template and generation config, which an engine takes along."""
        files = (self.directory / name for name in COMPANION_FILES)
        contents = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}
        return digest_of(contents)

    @property
    def license(self) -> str | None:
        """The licence that the model card's header names, if any; its own name where the hub knows it as "other"."""
        card = self.directory / "README.md"
        if not card.is_file():
            return None
        with card.open(encoding="utf-8", errors="replace") as stream:
            head = stream.read(4000)
        named: dict[str, str] = dict(re.findall(r"^(license(?:_name)?):[ \t]*(\S+)", head, re.MULTILINE))
        return named.get("license_name") or named.get("license")


def _fetch(url: str, revision: str | None, weights: bool, sources: Path | None, progress: ProgressFactory) -> Path:
    """A directory with what `url` holds of a checkpoint; without `sources` no more than its config."""
    if revision is not None:
        raise Refused(f"--revision {revision} is for hub models; {url!r} is a URL")
    if weights and sources is None:
        raise ValueError("a URL's weights need a folder to be fetched to")
    directory = staged_directory(url, sources)
    small = [CONFIG_FILE, *COMPANION_FILES, *LEGAL_FILES] if sources else [CONFIG_FILE]
    fetch(url, directory, _HUB_PATTERNS, _HUB_PATTERNS if weights else small, progress)
    return directory


def _resolve(model: str, revision: str | None, *, weights: bool) -> tuple[Path, str | None]:
    local = Path(model).expanduser()
    if local.is_dir():
        if (local / "trtbuild.json").is_file() or (local / "engine.json").is_file():
            raise Refused(f"model {model!r} is a result of trtbuild, not a Hugging Face checkpoint")
        if revision is not None:
            raise Refused(f"--revision {revision} is for hub models; {model!r} is a directory")
        return local.resolve(), None
    if local.is_file():
        raise Refused(f"model {model!r} is a file; name its directory, or a recipe (*.toml)")
    if model in KNOWN_MODELS:
        known = KNOWN_MODELS[model]
        bundled = bundled_directory(model)
        if bundled:
            return bundled, None
        if known.hub_id is None:
            raise CheckpointError(
                f"{model} is bundled with the source checkout (tests/checkpoints/{model}), which is not here"
            )
        facts = None if weights or revision else facts_directory(model)
        if facts:
            cached = _cached_snapshot(known.hub_id)
            return (cached, cached.name) if cached else (facts, None)
        return _download(known.hub_id, revision, weights=weights)
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        names = ", ".join(sorted(KNOWN_MODELS))
        raise Refused(
            f"model {model!r}: no such directory, not a hub id (OWNER/NAME), not a URL, and not a known name ({names})"
        )
    return _download(model, revision, weights=weights)


def _cached_snapshot(hub_id: str) -> Path | None:
    """The snapshot of the main branch in the hub's cache, if it has a config; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _download(hub_id: str, revision: str | None, *, weights: bool) -> tuple[Path, str | None]:
    """Fetch (or find in the cache) a snapshot; its directory is named after the commit that `revision` meant."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    is_silent = False
    try:
        patterns = _HUB_PATTERNS if weights else ["config.json", *COMPANION_FILES, *LEGAL_FILES]
        # Where the hub is silent, what is in the cache may do.
        is_silent = not _hub_answers()
        directory = Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=patterns, local_files_only=is_silent)
        )
    except HFValidationError as error:
        raise Refused(f"model {hub_id!r} is neither a directory nor a valid hub id: {error}") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = f"no answer in {_HUB_PATIENCE_S} s" if is_silent else str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"cannot fetch {hub_id} from the hub ({reason}); check the name, your token (HF_TOKEN) and the "
            "network, or pass a local directory"
        ) from error
    return directory, directory.name


def _hub_answers() -> bool:
    """False where the hub takes a connection and says nothing: huggingface_hub would wait for ever.

    Anything else, refused connections included, it reports soon and better.
    """
    import http.client
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=_HUB_PATIENCE_S).close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        return not isinstance(error, TimeoutError) and not isinstance(getattr(error, "reason", None), TimeoutError)
    return True
