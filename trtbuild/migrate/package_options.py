"""The options of `trtbuild package` (`--trtllm NAME=VALUE`) that give a new repository the old one's settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from trtbuild.errors import Refused
from trtbuild.migrate.check_parameters import parse_bool, parse_int
from trtbuild.migrate.models import Repository, TritonModel
from trtbuild.migrate.parameters import PARAMETERS, RENAMED, Role
from trtbuild.triton_repo.tensorrt_llm.option_texts import read_options
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions

# Said by the engine or by `package` itself.
_NOT_OPTIONS = (
    "FORCE_CPU_ONLY_INPUT_TENSORS", "gpt_model_path", "encoder_model_path", "tokenizer_dir", "executor_worker_path",
    "xgrammar_tokenizer_info_path", "enable_trt_overlap", "kv_cache_onboard_blocks",
)  # fmt: skip
_LOOKAHEAD = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")
_PLACEMENT = ("gpu_device_ids", "participant_ids")
# In this order: beams are decoded in a mode of theirs, and a mode has sizes.
_FOLLOWERS = {
    "max_beam_width": ("decoding_mode",),
    "decoding_mode": ("lookahead", "medusa_choices", "eagle_choices"),
}
_PYTHON_OPTIONS: tuple[tuple[Role, str, str], ...] = (
    ("preprocessing", "add_special_tokens", "preprocessing_instances"),
    ("postprocessing", "skip_special_tokens", "postprocessing_instances"),
    ("bls", "accumulate_tokens", "bls_instances"),
)
_DEFAULTS = {field.name: field.default for field in fields(TrtllmOptions)}


@dataclass(frozen=True)
class PackageOptions:
    """`values` are texts as `--trtllm` takes them, without what is its default; `notes` say what has no option."""

    values: dict[str, str]
    notes: list[str]


def package_options(repository: Repository, model: TritonModel, wrong: Mapping[str, str]) -> PackageOptions:
    """Of one `tensorrt_llm` model and the Python models around it.

    `wrong`: parameters that do not fit the engine, and what would; they are left out, as `package` refuses them.
    """
    values: dict[str, str] = {}
    notes: list[str] = []
    unfit = _with_followers(wrong)
    for settings in _settings(repository, model):
        if why := next((unfit[name] for name in settings if name in unfit), None):
            said = ", ".join(f"{name} = {text}" for name, text in settings.items())
            notes.append(f"left out, as it does not fit the engine: {said} ({why})")
            continue
        unknown = [name for name in settings if name not in _DEFAULTS]
        notes += [f"{name} = {settings[name]} has no option of trtbuild package" for name in unknown]
        known = {name: text for name, text in settings.items() if name in _DEFAULTS}
        try:
            read = read_options(f"{name}={text}" for name, text in (values | known).items())
        except Refused as error:
            said = ", ".join(f"{name} = {text}" for name, text in known.items())
            notes.append(f"left out: {said}: {error.message}")
            continue
        values |= {name: text for name, text in known.items() if getattr(read, name) != _DEFAULTS[name]}
    return PackageOptions(values, notes)


def _with_followers(wrong: Mapping[str, str]) -> dict[str, str]:
    """Settings that are refused without another one go with it."""
    found = dict(wrong)
    for name, followers in _FOLLOWERS.items():
        if name in found:
            found |= {follower: f"goes with {name}" for follower in followers if follower not in found}
    return found


def _settings(repository: Repository, model: TritonModel) -> Iterator[dict[str, str]]:
    """Names of TrtllmOptions, and what the repository says for them, as text; together what only goes together."""
    yield from _queue(model)
    if model.decoupled is not None or model.root.message("model_transaction_policy") is None:
        yield {"decoupled": str(bool(model.decoupled)).lower()}
    yield from _engine_settings(model)
    placement = {name: model.parameter(name) for name in _PLACEMENT}
    yield {name: text for name, text in placement.items() if text} | {"instances": str(_instances(model))}
    for role, parameter, count in _PYTHON_OPTIONS:
        for python_model in repository.of(role)[:1]:
            text = python_model.parameter(parameter)
            if text is not None:
                yield {parameter: str(text.lower() in ("true", "t", "yes", "y", "1")).lower()}
            yield {count: str(_instances(python_model))}


def _engine_settings(model: TritonModel) -> Iterator[dict[str, str]]:
    for name in model.parameters:
        right = RENAMED.get(name, name)
        row, text = PARAMETERS["tensorrt_llm"].get(right), model.parameter(name)
        if row is None or text is None or right in (*_NOT_OPTIONS, *_LOOKAHEAD, *_PLACEMENT):
            continue
        if row.kind == "bool":
            if (value := parse_bool(text)) is not None:
                yield {right: str(value).lower()}
        elif right == "gpt_model_type":
            yield {"batching_strategy": "inflight_fused_batching" if text in ("V1", "v1") else text}
        else:
            yield {right: text}
    lookahead = [parse_int(model.parameter(name)) for name in _LOOKAHEAD]
    if None not in lookahead:
        yield {"lookahead": ",".join(map(str, lookahead))}


def _queue(model: TritonModel) -> Iterator[dict[str, str]]:
    batching = model.root.message("dynamic_batching")
    if batching is None:
        return
    policy = batching.message("default_queue_policy")
    delay = batching.value("max_queue_delay_microseconds")
    size = policy.value("max_queue_size") if policy else None
    for name, value in (("max_queue_delay_microseconds", delay), ("max_queue_size", size)):
        if value is not None and value.number is not None:
            yield {name: str(value.number)}


def _instances(model: TritonModel) -> int:
    groups = model.root.messages("instance_group")
    count = groups[0].value("count") if groups else None
    return (count.number if count is not None else None) or 1
