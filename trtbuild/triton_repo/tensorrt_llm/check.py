"""The check of a TensorRT-LLM repository: what can be seen without its GPUs and its C++ backend.

Every config.pbtxt is parsed by Triton's protobuf and held against the others; where there is a Triton, it loads
`preprocessing` and `postprocessing`, which must do as the tokenizer does. The engine itself, and with it `ensemble` and
`tensorrt_llm_bls` as a whole, are not run: NOT_CHECKED says so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.errors import CheckFailed
from trtbuild.progress import ProgressFactory
from trtbuild.triton_repo.installation import STUB_ENVIRONMENT, TritonInstallation
from trtbuild.triton_repo.tensorrt_llm.configs import BACKEND
from trtbuild.triton_repo.tensorrt_llm.names import ModelNames
from trtbuild.triton_repo.tensorrt_llm.tensors import ModelRole
from trtbuild.triton_repo.triton_process import Ports, TritonProcess

NOT_CHECKED = (
    "the engine was not loaded: that takes its GPUs and the C++ backend of NGC's container. {engine}, and what "
    "goes through it ({ensemble}, {bls}), was parsed and compared, not run"
)
PROMPT = "Once upon a time, in a city by the sea,"
_LOAD_TIMEOUT_S = 300.0
# Triton's interpreter has its own numpy; the heavy ones are not asked for.
_NOT_LENT = ("numpy", "numpy.libs", "torch", "trtbuild")


@dataclass(frozen=True)
class TrtllmCheck:
    """`triton` is None where there was none to load the Python models with."""

    triton: str | None
    num_prompt_tokens: int | None
    not_checked: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_repository(
    repository: Path, names: ModelNames, installation: TritonInstallation | None, progress: ProgressFactory
) -> TrtllmCheck:
    """Raises `CheckFailed`, and `TrtBuildError` where Triton does not load a model."""
    problems = list(_config_problems(repository, names))
    if problems:
        raise CheckFailed(f"{repository}:" + "".join(f"\n  - {problem}" for problem in problems))
    if installation is None:
        return TrtllmCheck(None, None, _not_checked(names))
    with progress(f"checking {names['preprocessing']} and {names['postprocessing']} ({installation.source})", 1):
        return TrtllmCheck(installation.source, _ask_models(repository, names, installation), _not_checked(names))


def read_config(file: Path) -> Any:
    """A config.pbtxt by Triton's own protobuf; raises `CheckFailed` where it cannot be read."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    protobuf: Any = model_config_pb2
    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), protobuf.ModelConfig())
    except text_format.ParseError as error:
        raise CheckFailed(f"{file}: Triton's protobuf cannot read it: {error}") from error


def lend_packages(installation: TritonInstallation, directory: Path) -> TritonInstallation:
    """With `tokenizers` and all else that NGC's container has and nvidia-pytriton's interpreter has not.

    That interpreter takes its packages from the environment of the first python3 on PATH: one made in `directory`, of
    links to ours, and to the numpy that it needs.
    """
    if installation.stub is None:
        return installation
    (directory / "bin").mkdir(parents=True)
    shutil.copyfile(STUB_ENVIRONMENT / "pyvenv.cfg", directory / "pyvenv.cfg")
    for program in ("python", "python3"):
        (directory / "bin" / program).symlink_to((STUB_ENVIRONMENT / "bin" / program).absolute())
    ours = Path(sysconfig.get_path("purelib"))
    packages = directory / ours.relative_to(sys.prefix)
    packages.mkdir(parents=True)
    for package in ours.iterdir():
        if package.name not in _NOT_LENT and not package.name.endswith(".pth"):
            (packages / package.name).symlink_to(package)
    for numpy in (STUB_ENVIRONMENT / ours.relative_to(sys.prefix)).glob("numpy*"):
        (packages / numpy.name).unlink(missing_ok=True)
        (packages / numpy.name).symlink_to(numpy.absolute())
    path = f"{directory / 'bin'}{os.pathsep}{installation.environment.get('PATH', os.environ.get('PATH', ''))}"
    return replace(installation, environment={**installation.environment, "PATH": path})


def _config_problems(repository: Path, names: ModelNames) -> Iterator[str]:
    configs: dict[ModelRole, Any] = {
        role: read_config(repository / name / "config.pbtxt") for role, name in names.items()
    }
    for role, config in configs.items():
        if config.name != names[role]:
            yield f"{names[role]}/config.pbtxt: its name is {config.name!r}"
        if "${" in str(config):
            yield f"{names[role]}/config.pbtxt: a placeholder is left"
        for tensors in (config.input, config.output):
            found = [tensor.name for tensor in tensors]
            if len(set(found)) != len(found):
                yield f"{names[role]}/config.pbtxt: a tensor is declared twice"
    if configs["tensorrt_llm"].backend != BACKEND:
        yield f"{names['tensorrt_llm']}/config.pbtxt: backend {configs['tensorrt_llm'].backend!r}, not {BACKEND}"
    yield from _ensemble_problems(configs["ensemble"], {config.name: config for config in configs.values()})


def _ensemble_problems(ensemble: Any, models: Mapping[str, Any]) -> Iterator[str]:
    """Every mapped tensor exists on both sides, with one type, and comes from somewhere."""
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = models.get(step.model_name)
        if model is None:
            yield f"ensemble: no model {step.model_name}"
            continue
        inputs = {tensor.name: tensor for tensor in model.input}
        outputs = {tensor.name: tensor.data_type for tensor in model.output}
        for name, source in step.input_map.items():
            if name not in inputs or types.get(source) != inputs[name].data_type:
                yield f"ensemble: {step.model_name}'s input {name} and {source} do not fit"
        for name in set(inputs) - set(step.input_map):
            if not inputs[name].optional:
                yield f"ensemble: {step.model_name}'s input {name} is not given"
        for name, target in step.output_map.items():
            if name not in outputs:
                yield f"ensemble: {step.model_name} has no output {name}"
            types[target] = outputs.get(name, 0)
    for tensor in ensemble.output:
        if types.get(tensor.name) != tensor.data_type:
            yield f"ensemble: output {tensor.name} comes from nowhere, or as another type"


def _not_checked(names: ModelNames) -> str:
    return NOT_CHECKED.format(
        engine=names["tensorrt_llm"], ensemble=names["ensemble"], bls=names["tensorrt_llm_bls"]
    )  # fmt: skip


def _ask_models(repository: Path, names: ModelNames, installation: TritonInstallation) -> int:
    """Of a prompt; the number of its tokens."""
    with tempfile.TemporaryDirectory(prefix="trtbuild-check-") as folder:
        models = Path(folder) / "models"
        models.mkdir()
        for name in (names["preprocessing"], names["postprocessing"]):
            (models / name).symlink_to((repository / name).absolute())
        lent = lend_packages(installation, Path(folder) / "packages")
        try:
            with TritonProcess(lent, models, Ports.free(), ["--disable-auto-complete-config"]) as server:
                server.wait_ready(_LOAD_TIMEOUT_S)
                return _compare(f"127.0.0.1:{server.ports.grpc}", repository, names)
        finally:
            for compiled in repository.glob("*/1/__pycache__"):
                shutil.rmtree(compiled)


def _compare(url: str, repository: Path, names: ModelNames) -> int:
    import numpy as np
    from tokenizers import Tokenizer
    from tritonclient import grpc

    parameters = read_config(repository / names["preprocessing"] / "config.pbtxt").parameters
    tokenizer: Any = Tokenizer.from_file(
        str(repository / names["preprocessing"] / "1" / "tokenizer" / "tokenizer.json")
    )
    client = grpc.InferenceServerClient(url)

    def ask(role: ModelRole, inputs: dict[str, Any]) -> Any:
        sent = [grpc.InferInput(name, array.shape, _wire_type(array)) for name, array in inputs.items()]
        for tensor, array in zip(sent, inputs.values(), strict=True):
            tensor.set_data_from_numpy(array)
        return client.infer(names[role], sent)

    query = PROMPT
    if parameters["chat_template"].string_value == "messages":
        query = json.dumps([{"role": "user", "content": PROMPT}])
    asked = {"QUERY": np.array([[query.encode()]], dtype=np.object_), "REQUEST_OUTPUT_LEN": np.array([[8]], np.int32)}
    ids = ask("preprocessing", asked).as_numpy("INPUT_ID")
    if parameters["chat_template"].string_value == "off":
        special = parameters["add_special_tokens"].string_value == "true"
        _require(names["preprocessing"], ids[0].tolist(), tokenizer.encode(PROMPT, add_special_tokens=special).ids)
    tokens = {"TOKENS_BATCH": ids[:, None].astype(np.int32), "SEQUENCE_LENGTH": np.array([[ids.shape[1]]], np.int32)}
    text = ask("postprocessing", tokens).as_numpy("OUTPUT").reshape(-1)[0].decode()
    skip = read_config(repository / names["postprocessing"] / "config.pbtxt").parameters["skip_special_tokens"]
    expected = tokenizer.decode(ids[0].tolist(), skip_special_tokens=skip.string_value == "true")
    _require(names["postprocessing"], text, expected)
    return ids.shape[1]


def _wire_type(array: Any) -> str:
    return "BYTES" if array.dtype == object else "INT32"


def _require(model: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckFailed(
            f"Triton's model {model} does not do as the tokenizer does\n  expected: {expected!r}\n  Triton: {found!r}"
        )
