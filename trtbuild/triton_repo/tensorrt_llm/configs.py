"""config.pbtxt of the five models, through Triton's own protobuf."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from trtbuild.triton_repo.tensorrt_llm.parameters import (
    RepositoryFacts,
    bls_parameters,
    engine_parameters,
    postprocessing_parameters,
    preprocessing_parameters,
)
from trtbuild.triton_repo.tensorrt_llm.tensors import (
    FROM_PREPROCESSING,
    RENAMED,
    ROLES,
    TO_PREPROCESSING,
    ModelRole,
    Tensor,
    inputs_of,
    outputs_of,
)

BACKEND = "tensorrtllm"
# An ensemble's own tensors: between steps, not for clients.
_TOKENS, _LENGTHS = "_TOKENS_BATCH", "_SEQUENCE_LENGTH"


def config_messages(facts: RepositoryFacts) -> dict[ModelRole, Any]:
    """A `ModelConfig` for each role."""
    makers = {
        "preprocessing": _preprocessing, "tensorrt_llm": _engine, "postprocessing": _postprocessing,
        "ensemble": _ensemble, "tensorrt_llm_bls": _bls,
    }  # fmt: skip
    return {role: makers[role](facts) for role in ROLES}


def config_texts(facts: RepositoryFacts) -> dict[ModelRole, str]:
    """The same in Triton's text format."""
    from google.protobuf import text_format

    return {role: text_format.MessageToString(message) for role, message in config_messages(facts).items()}


def _engine(facts: RepositoryFacts) -> Any:
    config = _model("tensorrt_llm", facts, BACKEND)
    config.model_transaction_policy.decoupled = facts.options.decoupled
    _add_batching(config, facts)
    _add_instances(config, facts.options.instances)
    return _with_parameters(config, engine_parameters(facts))


def _preprocessing(facts: RepositoryFacts) -> Any:
    config = _model("preprocessing", facts, "python")
    _add_batching(config, facts)
    _add_instances(config, facts.options.preprocessing_instances)
    return _with_parameters(config, preprocessing_parameters(facts))


def _postprocessing(facts: RepositoryFacts) -> Any:
    config = _model("postprocessing", facts, "python")
    config.dynamic_batching.SetInParent()
    _add_instances(config, facts.options.postprocessing_instances)
    return _with_parameters(config, postprocessing_parameters(facts))


def _bls(facts: RepositoryFacts) -> Any:
    config = _model("tensorrt_llm_bls", facts, "python")
    config.model_transaction_policy.decoupled = facts.options.decoupled
    _add_instances(config, facts.options.bls_instances)
    return _with_parameters(config, bls_parameters(facts))


def _ensemble(facts: RepositoryFacts) -> Any:
    config = _model("ensemble", facts, None)
    config.platform = "ensemble"
    given = {tensor.name for tensor in config.input}
    shown = {tensor.name for tensor in config.output}
    prepared = [tensor.name for tensor in outputs_of("preprocessing", facts.engine)]
    produced = [tensor.name for tensor in outputs_of("tensorrt_llm", facts.engine)]
    _add_step(
        config, facts, "preprocessing",
        {new: name for name, new in TO_PREPROCESSING.items() if name in given},
        {name: f"_{name}" for name in prepared},
    )  # fmt: skip
    passed = {RENAMED.get(name, name): name for name in sorted(given) if name not in TO_PREPROCESSING}
    _add_step(
        config, facts, "tensorrt_llm",
        {FROM_PREPROCESSING[name]: f"_{name}" for name in prepared} | passed,
        {"output_ids": _TOKENS, "sequence_length": _LENGTHS} | {name: name for name in produced if name in shown},
    )  # fmt: skip
    _add_step(
        config, facts, "postprocessing",
        {"TOKENS_BATCH": _TOKENS, "SEQUENCE_LENGTH": _LENGTHS}, {"OUTPUT": "text_output"},
    )  # fmt: skip
    return config


def _model(role: ModelRole, facts: RepositoryFacts, backend: str | None) -> Any:
    """With its tensors."""
    protobuf = _protobuf()
    config = protobuf.ModelConfig(name=facts.names[role], max_batch_size=facts.options.max_batch_size)
    if backend is not None:
        config.backend = backend
    guided = facts.options.guided_decoding_backend is not None
    _add_inputs(config, inputs_of(role, facts.engine, guided))
    for tensor in outputs_of(role, facts.engine):
        config.output.add(name=tensor.name, data_type=_type_of(tensor), dims=tensor.dims)
    return config


def _add_inputs(config: Any, tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        added = config.input.add(
            name=tensor.name, data_type=_type_of(tensor), dims=tensor.dims, optional=tensor.optional,
            allow_ragged_batch=tensor.ragged,
        )  # fmt: skip
        if tensor.scalar:
            added.reshape.SetInParent()


def _add_batching(config: Any, facts: RepositoryFacts) -> None:
    batching = config.dynamic_batching
    batching.preferred_batch_size.append(facts.options.max_batch_size)
    batching.max_queue_delay_microseconds = facts.options.max_queue_delay_microseconds
    batching.default_queue_policy.max_queue_size = facts.options.max_queue_size


def _add_instances(config: Any, count: int) -> None:
    """The backend finds its GPUs by rank, or by gpu_device_ids."""
    config.instance_group.add(count=count, kind=_protobuf().ModelInstanceGroup.KIND_CPU)


def _add_step(
    config: Any, facts: RepositoryFacts, role: ModelRole, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> None:
    step = config.ensemble_scheduling.step.add(model_name=facts.names[role], model_version=-1)
    step.input_map.update(inputs)
    step.output_map.update(outputs)


def _with_parameters(config: Any, parameters: Mapping[str, str]) -> Any:
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def _type_of(tensor: Tensor) -> int:
    return _protobuf().DataType.Value(f"TYPE_{tensor.dtype}")


def _protobuf() -> Any:
    """Its members are made when it is imported; no type checker sees them."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2
