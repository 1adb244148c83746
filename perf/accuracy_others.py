"""A child of perf/accuracy.py, run by a Python that has llm-compressor and ModelOpt: quantize, then evaluate.

`PYTHON accuracy_others.py JOB RESULT`, JSON files both. Each tool gets the calibration tokens of trtbuild and the
recipe that its documentation gives; lm_head and MoE routers stay in 16 bit. The quantized model is evaluated in memory,
by the tool's own fake-quantized forward.
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from accuracy_measure import measured, read_job, versions, write_result

# CPU only, and single-threaded tokenization, before anything is imported that reads these.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
warnings.filterwarnings("ignore", category=DeprecationWarning)

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

IGNORED = ["lm_head", "re:.*mlp.gate$", "re:.*block_sparse_moe.gate$", "re:.*shared_expert_gate$"]
BLOCKS_AT_ONCE = 4
# AWQ of 0.14.0.1 pins memory whatever the device, which torch refuses without an accelerator; it is for speed only.
PATCH_NOTE = "IntermediatesCache.pin_memory does nothing: it fails without an accelerator"


def load(model: str, moe: bool, linearize: bool = False) -> Any:
    """In bf16; `linearize` lets llm-compressor load an MoE with one linear layer for each expert's matrix."""
    context: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if linearize and moe:
        from llmcompressor.modeling.moe.linearize import load_quantizable_moe

        context = load_quantizable_moe()
    with context:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()


def llm_compressor(recipe: Callable[[], list[Any]], job: dict[str, Any]) -> Any:
    """`oneshot`, which calibrates every expert by its default."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda *_: None
    model = load(job["model"], job["moe"], linearize=True)
    tokens = job["calibration"]
    data = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    oneshot(
        model=model, recipe=recipe(), dataset=data, num_calibration_samples=len(tokens), max_seq_length=len(tokens[0])
    )
    return model


def modelopt(config: dict[str, Any], job: dict[str, Any]) -> Any:
    import modelopt.torch.quantization as mtq

    model = load(job["model"], job["moe"])
    tokens = torch.tensor(job["calibration"])

    def forward(quantized: Any) -> None:
        with torch.inference_mode():
            for row in tokens.split(1):
                quantized(row)

    return mtq.quantize(model, copy.deepcopy(config), forward)


def as_exported(model: Any) -> Any:
    """With one scale for the layers that share an input (q, k, v; gate, up), as every checkpoint of ModelOpt has it."""
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    with torch.inference_mode():
        requantize_resmooth_fused_llm_layers(model)
    return model


def quantize(method: str, job: dict[str, Any]) -> Any:
    """The model that `method` makes."""
    tool, _, name = method.rpartition(" ")
    if name == "bf16":
        return load(job["model"], job["moe"])
    if tool == "modelopt":
        import modelopt.torch.quantization as mtq

        config = mtq.FP8_DEFAULT_CFG if name == "fp8" else mtq.INT4_AWQ_CFG
        model = modelopt(config, job)
        return as_exported(model) if name.endswith("-exported") else model
    return llm_compressor(lambda: recipe_of(name), job)


def recipe_of(name: str) -> list[Any]:
    """llm-compressor's recipe; every parameter that is not here is its default."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    def plain(scheme: str) -> Any:
        return QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=IGNORED)

    recipes = {
        "rtn": lambda: [plain("W4A16")],
        "rtn-asym": lambda: [plain("W4A16_ASYM")],
        "gptq": lambda: [GPTQModifier(targets=["Linear"], scheme="W4A16", ignore=IGNORED)],
        "awq": lambda: [AWQModifier(), plain("W4A16_ASYM")],
        "awq-sym": lambda: [AWQModifier(), plain("W4A16")],
        "fp8-dynamic": lambda: [plain("FP8_DYNAMIC")],
    }
    return recipes[name]()


@torch.inference_mode()
def evaluate(model: Any, blocks: Iterable[list[int]]) -> list[float]:
    """Mean NLL in nats of each block's tokens after its first."""
    losses: list[float] = []
    for batch in torch.tensor(list(blocks)).split(BLOCKS_AT_ONCE):
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        for states, block in zip(hidden, batch, strict=True):
            logits = model.lm_head(states).float()
            losses.append(round(float(torch.nn.functional.cross_entropy(logits, block[1:])), 5))
    return losses


def main() -> None:
    job = read_job()
    method = job["method"]
    # The imports are not part of what is measured.
    if method.startswith("modelopt"):
        import modelopt.torch.quantization  # noqa: F401
    elif method != "bf16":
        import llmcompressor  # noqa: F401
    model, figures = measured(lambda: quantize(method, job))
    if method.startswith("modelopt") and method != "modelopt bf16":
        import modelopt.torch.quantization as mtq

        # The same values, without quantizing every weight again in every forward pass.
        mtq.fold_weight(model)
    nll = {name: evaluate(model, blocks) for name, blocks in job["texts"].items()}
    names = ("llmcompressor", "compressed-tensors", "nvidia-modelopt", "torch", "transformers")
    note = {"note": PATCH_NOTE} if method.startswith("llm-compressor awq") else {}
    write_result({**figures, **note, "nll": nll, "versions": versions(*names)})


if __name__ == "__main__":
    main()
