"""The five models of a TensorRT-LLM engine, laid out as a Triton model repository.

    preprocessing/      config.pbtxt, 1/model.py, 1/trtllm_*.py, 1/tokenizer/
    tensorrt_llm/       config.pbtxt, 1/engine/ (hard links)
    postprocessing/     as preprocessing
    tensorrt_llm_bls/   as preprocessing
    ensemble/           config.pbtxt, 1/

Our models find their tokenizer beside themselves. The C++ backend needs an absolute path of the engine, as its own
process sees it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path, PurePosixPath

from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import Refused
from trtbuild.triton_repo.tensorrt_llm.compatibility import check_options
from trtbuild.triton_repo.tensorrt_llm.configs import config_texts
from trtbuild.triton_repo.tensorrt_llm.names import ModelNames
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.parameters import TOKENIZER, RepositoryFacts
from trtbuild.triton_repo.tensorrt_llm.tensors import ModelRole
from trtbuild.triton_repo.tensorrt_llm.tokenizer_facts import TokenizerFacts, xgrammar_tokenizer_info

MODEL_SOURCES = Path(__file__).parent / "models"
_SHARED_SOURCES = ("trtllm_text.py", "trtllm_chat.py")
_SOURCES: dict[ModelRole, str] = {
    "preprocessing": "preprocessing.py", "postprocessing": "postprocessing.py", "tensorrt_llm_bls": "bls.py",
}  # fmt: skip
ENGINE = "engine"
_XGRAMMAR = "xgrammar_tokenizer_info.json"


def repository_facts(
    passport: Passport,
    engine: TrtllmEngine,
    options: TrtllmOptions,
    *,
    final: Path,
    prefix: str | None = None,
    engine_path: str | None = None,
) -> RepositoryFacts:
    """Everything checked and filled in; nothing is written. Raises `Refused`, `CheckpointError`.

    `final`: the repository's place. `engine_path`: where Triton's process finds the engine, in a container that has
    the repository elsewhere; `final`'s own by default.
    """
    names = ModelNames(prefix)
    version = PurePosixPath(final.absolute(), names["tensorrt_llm"], "1")
    path = PurePosixPath(engine_path) if engine_path is not None else version / ENGINE
    if not path.is_absolute():
        raise Refused(f"engine path {engine_path}: the backend needs an absolute one")
    options = check_options(options, passport, engine)
    # Beside the engine's directory, wherever that is.
    grammar = path.parent / _XGRAMMAR if options.guided_decoding_backend else None
    tokenizer = TokenizerFacts.read(passport.tokenizer_directory)
    return RepositoryFacts(engine, options, tokenizer, names, path, grammar)


def write_repository(
    directory: Path,
    passport: Passport,
    engine: TrtllmEngine,
    options: TrtllmOptions,
    *,
    final: Path | None = None,
    prefix: str | None = None,
    engine_path: str | None = None,
    link_engine: bool = True,
) -> list[str]:
    """Write the five models into `directory`; their names. `final`: where they will be moved; see `repository_facts`.

    `link_engine` False: the engine stays where it is, and `engine_path` says where that is.
    """
    if not link_engine and engine_path is None:
        raise Refused("a repository without the engine needs the engine's path, as Triton's process sees it")
    facts = repository_facts(
        passport, engine, options, final=final or directory, prefix=prefix, engine_path=engine_path
    )
    for role, text in config_texts(facts).items():
        model = directory / facts.names[role]
        (model / "1").mkdir(parents=True)
        (model / "config.pbtxt").write_text(text, encoding="utf-8")
        if role in _SOURCES:
            _write_python_model(model / "1", _SOURCES[role], passport)
    own = directory / facts.names["tensorrt_llm"] / "1"
    if link_engine:
        link_tree(engine.directory, own / ENGINE)
    if facts.xgrammar_path is not None:
        info = xgrammar_tokenizer_info(passport.tokenizer_directory, facts.tokenizer.end_ids)
        (own / _XGRAMMAR).write_text(info, encoding="utf-8")
    return list(facts.names.values())


def _write_python_model(version: Path, source: str, passport: Passport) -> None:
    shutil.copyfile(MODEL_SOURCES / source, version / "model.py")
    for shared in _SHARED_SOURCES:
        shutil.copyfile(MODEL_SOURCES / shared, version / shared)
    link_tree(passport.tokenizer_directory, version / TOKENIZER)


def link_tree(source: Path, target: Path) -> None:
    """Hard links of every file, copies across file systems."""
    for folder, _, files in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(parents=True)
        for file in files:
            try:
                os.link(Path(folder, file), place / file)
            except OSError:
                shutil.copy2(Path(folder, file), place / file)
