"""config.pbtxt of our Triton models, written through Triton's own protobuf, and read back by the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from trtbuild.errors import Refused
from trtbuild.triton_repo.tensors import ModelKind, Tensor, inputs_of, model_name, outputs_of


@dataclass(frozen=True)
class WorkerSettings:
    """How a model's engine worker is started; the parameters of config.pbtxt, where an operator may change them.

    None: the worker's own default. They are the worker's flags of the same names.
    """

    max_queue: int = 256
    """Requests that may wait for a slot; those beyond are told to come again."""

    executor: str | None = None
    slots: int | None = None
    threads: int | None = None
    dtype: str | None = None
    loader: str | None = None
    """MODULE:FUNCTION that loads the engine; for tests and benchmarks."""

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> WorkerSettings:
        """Raises `Refused` naming the parameter that is not what it should be."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(cls) if f.name in parameters):
            text = parameters[name]
            if name in ("slots", "threads", "max_queue") and not text.isdecimal():
                raise Refused(f"config.pbtxt: parameter {name} {text!r}: must be a whole number")
            values[name] = int(text) if name in ("slots", "threads", "max_queue") else text
        return cls(**values)

    def flags(self) -> dict[str, object]:
        """As the worker's flags, without dashes."""
        return {name.replace("_", "-"): value for name, value in asdict(self).items()}

    def to_parameters(self) -> dict[str, str]:
        return {name: str(value) for name, value in asdict(self).items() if value is not None}


def config_text(
    name: str, kind: ModelKind, max_batch_size: int, settings: WorkerSettings, *, as_name: str | None = None
) -> str:
    """config.pbtxt of the engine `name`'s model of that kind, as Triton's text format.

    `as_name`: another name for the model than `model_name(name, kind)`.
    """
    from google.protobuf import text_format

    protobuf = _protobuf()
    config = protobuf.ModelConfig(
        name=as_name or model_name(name, kind), backend="python", max_batch_size=max_batch_size
    )
    for tensor in inputs_of(kind):
        config.input.add(name=tensor.name, data_type=_type_of(tensor), dims=tensor.dims, optional=not tensor.required)
    for tensor in outputs_of(kind):
        config.output.add(name=tensor.name, data_type=_type_of(tensor), dims=tensor.dims)
    # The worker holds the engine; of the forwarder one process on the CPU is enough.
    config.instance_group.add(count=1, kind=protobuf.ModelInstanceGroup.KIND_CPU)
    config.model_transaction_policy.decoupled = kind != "unary"
    for key, value in {"engine": name, "kind": kind, **settings.to_parameters()}.items():
        config.parameters[key].string_value = value
    return text_format.MessageToString(config)


def _type_of(tensor: Tensor) -> int:
    return _protobuf().DataType.Value(f"TYPE_{tensor.dtype}")


def _protobuf() -> Any:
    """Its members are made when it is imported; no type checker sees them."""
    from tritonclient.grpc import model_config_pb2

    return model_config_pb2
