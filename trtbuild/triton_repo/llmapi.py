"""`trtbuild package --llmapi`: a Triton model over TensorRT-LLM's LLM API, straight from a Hugging Face checkpoint.

    triton_repo/models/NAME/   config.pbtxt, trtbuild.json, 1/model.py, 1/llmapi_requests.py, 1/model.yaml,
                               1/checkpoint/ (hard links)

For TensorRT-LLM 1.3 and later, which has no engines. None is built, and nothing of it runs here: its package cannot be
installed on most machines. What can be known beforehand is checked: that its reader knows the quantization.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from trtbuild import __version__
from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.hub_formats.config import KEYS
from trtbuild.checkpoints.rank_checkpoint import AUTHORITY
from trtbuild.checkpoints.source_files import CONFIG_FILE, read_json, read_shards
from trtbuild.engines.export.tensors import NOT_IN_TENSORRT_LLM
from trtbuild.engines.passport import PASSPORT
from trtbuild.errors import Refused, refuse_all
from trtbuild.triton_repo.llmapi_files.llmapi_requests import INPUTS, OUTPUTS, Tensor
from trtbuild.triton_repo.packaged_models import LLMAPI_KIND
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.workspace import (
    PACKAGE_RECORD,
    Workspace,
    check_name,
    locked,
    replace_directory,
    sync,
    write_json,
)
from trtbuild.workspace import read_json as read_record

DEFAULT_NAME = "tensorrt_llm"
_KIND = LLMAPI_KIND
_CHECKPOINT = "checkpoint"
_FILES = Path(__file__).parent / "llmapi_files"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf", ".msgpack", ".h5")
# What TensorRT-LLM's reader (its _torch/model_config.py) knows of ModelOpt's algorithms, and of other methods.
_ALGORITHMS = (
    "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_BLOCK_SCALES", "FP8_PB_WO", "W8A16", "W4A16_AWQ", "W4A8_AWQ", "NVFP4",
    "NVFP4_AWQ", "W4A16_NVFP4", "MIXED_PRECISION", "MXFP8",
)  # fmt: skip
_METHODS = ("mxfp4", "mxfp8", "nvfp4")
# Parameters of the five-model repository: those that the LLM API has too, and those that have a name of ours here.
_SHARED = {"max_beam_width"}
_RENAMED = {
    "kv_cache_free_gpu_mem_fraction": "kv_cache_fraction", "enable_kv_cache_reuse": "block_reuse",
    "enable_chunked_context": "chunked_prefill",
}  # fmt: skip
_YAML_HEAD = """\
# Arguments of tensorrt_llm.LLM, TensorRT-LLM 1.3 and later; its documentation of TorchLlmArgs has more of them.
# `model` is beside this file, or a path or hub id. `triton_config` is model.py's, and must agree with config.pbtxt.
"""


@dataclass(frozen=True)
class LlmapiOptions:
    """What model.yaml says; None is left to TensorRT-LLM.

    `arguments` are any further ones of `tensorrt_llm.LLM`. `decoupled` False gives a model that plain infer can ask,
    and that cannot stream.
    """

    tp: int = 1
    pp: int = 1
    moe_ep: int | None = None
    max_batch_size: int | None = None
    max_num_tokens: int | None = None
    max_seq_len: int | None = None
    kv_cache_fraction: float | None = None
    block_reuse: bool | None = None
    chunked_prefill: bool | None = None
    guided_decoding_backend: str | None = None
    decoupled: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_texts(cls, texts: Sequence[str]) -> LlmapiOptions:
        """NAME=VALUE, of a field or any other argument of `tensorrt_llm.LLM`; values are JSON, or text.

        Raises Refused for what is not NAME=VALUE, and for a field's value of another type.
        """
        found: dict[str, Any] = {"arguments": {}}
        problems: list[str] = []
        names = {one.name for one in fields(cls)} - {"arguments"}
        for text in texts:
            name, sign, value = text.partition("=")
            if not sign or not name.isidentifier():
                problems.append(f"{text}: must be NAME=VALUE, such as tp=2 or max_num_tokens=8192")
                continue
            if name in _FIVE_MODELS - names:
                problems.append(_not_here(name))
                continue
            try:
                parsed = json.loads(value)
            except json.JSONDecodeError:
                parsed = value
            (found if name in names else found["arguments"])[name] = parsed
        refuse_all("--trtllm", problems)
        try:
            return TypeAdapter(cls).validate_python(found)
        except ValidationError as error:
            lines = [f"{one['loc'][0]}: {one['msg']} (found {one['input']!r})" for one in error.errors()]
            raise Refused("--trtllm: " + "; ".join(lines)) from error

    def to_yaml(self) -> dict[str, Any]:
        """The content of model.yaml."""
        cache = {"free_gpu_memory_fraction": self.kv_cache_fraction, "enable_block_reuse": self.block_reuse}
        cache = {key: value for key, value in cache.items() if value is not None}
        content: dict[str, Any] = {
            "model": _CHECKPOINT,
            "backend": "pytorch",
            "tensor_parallel_size": self.tp,
            "pipeline_parallel_size": self.pp,
            "moe_expert_parallel_size": self.moe_ep,
            "max_batch_size": self.max_batch_size,
            "max_num_tokens": self.max_num_tokens,
            "max_seq_len": self.max_seq_len,
            "enable_chunked_prefill": self.chunked_prefill,
            "guided_decoding_backend": self.guided_decoding_backend,
            "kv_cache_config": cache or None,
        }
        content = {key: value for key, value in content.items() if value is not None}
        return {**content, **self.arguments, "triton_config": {"decoupled": self.decoupled, "max_batch_size": 1}}


_FIVE_MODELS = {one.name for one in fields(TrtllmOptions)} - _SHARED


def _not_here(name: str) -> str:
    if name in _RENAMED:
        return f"{name} is of the five-model repository; with --llmapi it is {_RENAMED[name]}"
    ours = ", ".join(one.name for one in fields(LlmapiOptions) if one.name != "arguments")
    return f"{name} is of the five-model repository, and no argument of tensorrt_llm.LLM; there are {ours}, and its own"


@dataclass(frozen=True)
class PackagedLlmapi:
    """What `package_llmapi` made; `quantization` is the checkpoint's, None where it is in 16 bit."""

    name: str
    directory: Path
    quantization: str | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "directory": str(self.directory), "notes": list(self.notes)}


def package_llmapi(
    place: Workspace, checkpoint_dir: Path, name: str = DEFAULT_NAME, options: LlmapiOptions | None = None
) -> PackagedLlmapi:
    """Put a Triton model over the Hugging Face checkpoint in `checkpoint_dir` into the repository.

    Raises Refused where TensorRT-LLM would not load it, and for a name that is another model's.
    """
    options, final = options or LlmapiOptions(), place.models / check_name(name)
    quantization = _check(checkpoint_dir, options)
    replaced = _check_target(final)
    place.models.mkdir(parents=True, exist_ok=True)
    staging = place.packages_staging.absolute() / name
    with locked(place.models.parent / f".{name}.lock", final):
        shutil.rmtree(staging, ignore_errors=True)
        model = staging / name
        _lay_out(model, name, checkpoint_dir, options)
        for path in model.rglob("*"):
            sync(path)
        replace_directory(model, final, staging / f"{name}.old")
        shutil.rmtree(staging)
    return PackagedLlmapi(name, final, quantization, (*_replacement(replaced, checkpoint_dir), *_notes(options)))


def print_packaged_llmapi(packaged: PackagedLlmapi) -> None:
    held = packaged.quantization or "16 bit"
    click.echo(f"{packaged.directory}: {held}, for TensorRT-LLM 1.3 and later; no engine was built")
    for note in packaged.notes:
        click.echo(f"  note: {note}", err=True)
    click.echo(f"  next, in a container that has it: trtbuild serve {packaged.name}")


def _replacement(replaced: str | None, checkpoint_dir: Path) -> list[str]:
    if replaced is None or Path(replaced).absolute() == checkpoint_dir.absolute():
        return []
    return [f"it replaced the model of that name over {replaced}; --alias gives this one a name of its own"]


def _notes(options: LlmapiOptions) -> Iterator[str]:
    yield "nobody has loaded it: TensorRT-LLM is not installed here; the container loads it when Triton starts"
    if options.tp * options.pp > 1:
        yield f"takes {options.tp * options.pp} GPUs of one machine; several machines need TensorRT-LLM's own launcher"


def _check(directory: Path, options: LlmapiOptions) -> str | None:
    """The checkpoint's quantization, by TensorRT-LLM's name. Headers are read, the values are not."""
    if not directory.is_dir():
        raise Refused(f"{directory}: no such directory; trtbuild export makes a checkpoint that TensorRT-LLM loads")
    _check_hugging_face(directory)
    hf = read_json(directory, CONFIG_FILE)
    refuse_all(f"package --llmapi {directory}", _problems(directory, hf, options))
    _ = read_shards(directory)
    return _quantization(directory, hf)[0]


def _check_hugging_face(directory: Path) -> None:
    """build/NAME and engines/NAME have files of the same names."""
    if (directory / PASSPORT).is_file():
        raise Refused(f"{directory} is an engine; trtbuild package {directory.name}, without --llmapi, is for engines")
    if (directory / AUTHORITY).is_file():
        raise Refused(
            f"{directory} has checkpoints of ranks, as trtbuild convert writes them; --llmapi takes a Hugging Face "
            f"directory: trtbuild export {directory.name} --scheme modelopt -o DIR makes one"
        )


def _problems(directory: Path, hf: dict[str, Any], options: LlmapiOptions) -> Iterator[str]:
    if not any(directory.glob("tokenizer*")):
        yield "no tokenizer; put its files there"
    found, problem = _quantization(directory, hf)
    if problem:
        yield problem
    # What TensorRT-LLM reads of quantizations is not what we do.
    config = read_config({key: value for key, value in hf.items() if key not in KEYS})
    if config.architecture in NOT_IN_TENSORRT_LLM:
        yield f"TensorRT-LLM's PyTorch backend has no {config.architecture}; trtbuild compile makes an engine of it"
    if config.num_heads % options.tp:
        yield f"--tp {options.tp} does not divide the model's {config.num_heads} heads"
    if options.pp > config.num_layers:
        yield f"--pp {options.pp} is more than the model's {config.num_layers} layers"
    if found == "W4A16_AWQ" and config.moe is not None:
        yield "TensorRT-LLM computes no experts with int4 weights and 16-bit activations; export with --precision fp8"
    overlap = sorted(set(options.arguments) & {"model", "triton_config"})
    if overlap:
        yield f"{overlap[0]} is not for further arguments: the package sets it"


def _quantization(directory: Path, hf: dict[str, Any]) -> tuple[str | None, str | None]:
    """(TensorRT-LLM's name of the quantization, what is wrong with it)."""
    again = "export it again: trtbuild export NAME --scheme modelopt"
    modelopt = read_json(directory, "hf_quant_config.json") if (directory / "hf_quant_config.json").is_file() else None
    given = hf.get("quantization_config") or hf.get("compression_config")
    if modelopt is not None:
        algorithm = (modelopt.get("quantization") or {}).get("quant_algo")
        return (
            algorithm,
            None if algorithm in _ALGORITHMS else f"quant_algo {algorithm!r} is not read; {again}",
        )
    if not given:
        return None, None
    method = str(given.get("quant_method"))
    if method == "modelopt":
        algorithm = given.get("quant_algo")
        return algorithm, None if algorithm in _ALGORITHMS else f"quant_algo {algorithm!r} is not read; {again}"
    if method == "compressed-tensors":
        groups = (given.get("config_groups") or {}).values()
        return "compressed-tensors", next(filter(None, (_group_problem(group, again) for group in groups)), None)
    if method in _METHODS or (method == "fp8" and given.get("weight_block_size")):
        return method, None
    return method, f"quant_method {method!r}: TensorRT-LLM's PyTorch backend would take the weights for 16 bit; {again}"


def _group_problem(group: Mapping[str, Any], again: str) -> str | None:
    """TensorRT-LLM takes of this form fp8 with a scale for each row (or block) and dynamic activations, and fp4."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    held = (weights.get("type"), weights.get("num_bits"), weights.get("strategy"), inputs.get("strategy"))
    if held in (("float", 8, "channel", "token"), ("float", 8, "block", "group")) or held[:2] == ("float", 4):
        return None
    kind = f"{held[0]} {held[1]}, strategy {held[2]!r}"
    return f"compressed-tensors weights ({kind}) are not read by TensorRT-LLM; {again}"


def _check_target(final: Path) -> str | None:
    """The checkpoint of the model that will be replaced; None where there is none."""
    if not final.exists():
        return None
    record = final / PACKAGE_RECORD
    content = read_record(record) if record.is_file() else {}
    if content.get("kind") != _KIND:
        raise Refused(f"{final} is there and is another model; give this one another name by --alias")
    return str(content.get("checkpoint"))


def _lay_out(model: Path, name: str, checkpoint_dir: Path, options: LlmapiOptions) -> None:
    import yaml

    version = model / "1"
    (version / _CHECKPOINT).mkdir(parents=True)
    for file in ("model.py", "llmapi_requests.py"):
        shutil.copyfile(_FILES / file, version / file)
    text = yaml.safe_dump(options.to_yaml(), sort_keys=False)
    (version / "model.yaml").write_text(_YAML_HEAD + text, encoding="utf-8")
    (model / "config.pbtxt").write_text(llmapi_config(name, options.decoupled), encoding="utf-8")
    for file in _checkpoint_files(checkpoint_dir):
        _link(file, version / _CHECKPOINT / file.name)
    record = {
        "format": 1, "trtbuild": __version__, "kind": _KIND, "engine": name, "models": [name],
        "checkpoint": str(checkpoint_dir),
    }  # fmt: skip
    write_json(model / PACKAGE_RECORD, record)


def llmapi_config(name: str, decoupled: bool) -> str:
    """config.pbtxt, through Triton's own protobuf; one prompt in a request, any number of requests at once."""
    from google.protobuf import text_format

    from trtbuild.triton_repo.model_config import _protobuf

    protobuf = _protobuf()
    config = protobuf.ModelConfig(name=name, backend="python", max_batch_size=1)
    for tensor in INPUTS:
        for own in filter(None, (tensor.name, tensor.alias)):
            config.input.add(name=own, data_type=_type_of(protobuf, tensor), dims=tensor.dims, optional=True)
    for tensor in OUTPUTS:
        config.output.add(name=tensor.name, data_type=_type_of(protobuf, tensor), dims=tensor.dims)
    # TensorRT-LLM starts its own process for each GPU.
    config.instance_group.add(count=1, kind=protobuf.ModelInstanceGroup.KIND_CPU)
    config.model_transaction_policy.decoupled = decoupled
    return text_format.MessageToString(config)


def _type_of(protobuf: Any, tensor: Tensor) -> int:
    return protobuf.DataType.Value(f"TYPE_{tensor.dtype}")


def _checkpoint_files(directory: Path) -> list[Path]:
    """The weights that the index names, and every other file but those of weights in other forms."""
    weights = {entry.file for entry in read_shards(directory).values()}
    others = [file for file in directory.iterdir() if file.is_file() and not file.name.endswith(_WEIGHTS)]
    return sorted(weights) + sorted(file for file in others if not file.name.startswith("."))


def _link(source: Path, target: Path) -> None:
    """A hard link of what a link leads to, a copy across file systems."""
    real = source.resolve()
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
