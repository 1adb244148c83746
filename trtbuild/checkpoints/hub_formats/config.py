"""Reading `quantization_config` (or `compression_config`) of a config.json, by its `quant_method`.

What cannot be represented, and every option that is not known here, is a problem that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from trtbuild.checkpoints.hub_formats.compressed_tensors import compressed_problems, read_compressed
from trtbuild.checkpoints.hub_formats.fp8_formats import fbgemm_problems, fp8_problems, read_fbgemm, read_fp8
from trtbuild.checkpoints.hub_formats.integer_formats import awq_problems, gptq_problems, read_awq, read_gptq
from trtbuild.checkpoints.hub_formats.modelopt import modelopt_problems, read_modelopt
from trtbuild.checkpoints.hub_formats.options import Options
from trtbuild.checkpoints.hub_formats.scheme import HubQuantization

KEYS = ("quantization_config", "compression_config")
READ = (
    "awq (gemm), gptq (4 bits; 8 bits in whole rows), fp8, fbgemm_fp8, modelopt, and compressed-tensors "
    "(pack-quantized, float-quantized)"
)


def quantization_problems(hf: Options) -> Iterator[str]:
    """Everything about a config.json's quantization that we cannot read or represent."""
    given = [key for key in KEYS if hf.get(key)]
    if len(given) > 1:
        yield "quantization_config and compression_config are both given; remove the one that the weights are not in"
    elif given:
        options = hf[given[0]]
        if not isinstance(options, dict):
            yield f"{given[0]} is {options!r}, but must be an object"
            return
        method = options.get("quant_method", "compressed-tensors" if "config_groups" in options else None)
        problems = _PROBLEMS.get(method) if isinstance(method, str) else None
        if problems is None:
            yield f"the checkpoint is quantized with quant_method {method!r}, which is not read; read are {READ}"
            return
        for problem in problems(options):
            yield f"{given[0]} ({method}): {problem}"


def read_quantization(hf: Options) -> HubQuantization | None:
    """The quantization of a config.json in which `quantization_problems` finds nothing; None for a 16-bit model."""
    options = next((hf[key] for key in KEYS if hf.get(key)), None)
    if options is None:
        return None
    return _READERS[options.get("quant_method", "compressed-tensors")](options)


_PROBLEMS: dict[str, Callable[[Options], Iterator[str]]] = {
    "awq": awq_problems,
    "gptq": gptq_problems,
    "fp8": fp8_problems,
    "fbgemm_fp8": fbgemm_problems,
    "compressed-tensors": compressed_problems,
    "modelopt": modelopt_problems,
}
_READERS: dict[str, Callable[[Options], HubQuantization]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "fp8": read_fp8,
    "fbgemm_fp8": read_fbgemm,
    "compressed-tensors": read_compressed,
    "modelopt": read_modelopt,
}
