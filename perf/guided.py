"""What guided decoding and bad strings cost: building the vocabulary, compiling, and milliseconds for each token.

    python perf/guided.py TOKENIZER_DIR VOCAB_SIZE [OUTPUT.jsonl]

One thread; random logits drawn at temperature 1, behind a step of 20 ms. "mask" is made beside that step; "forbid"
(waiting for the mask, writing it) and "accept" (going on by the token) are what the scheduler's thread pays.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from trtbuild.engines.serving.constraints import Constrainer
from trtbuild.engines.serving.request import SamplingParams
from trtbuild.engines.serving.sampling import SamplerState, sample
from trtbuild.engines.serving.vocabulary import Vocabulary

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 200},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 5, "maxItems": 10},
        "size": {"type": "object", "properties": {"x": {"type": "number"}, "unit": {"enum": ["mm", "cm", "m"]}}},
    },
    "required": ["name", "tags", "size"],
}
CASES: dict[str, dict[str, Any]] = {
    "json_schema": {"guide_type": "json_schema", "guide": json.dumps(SCHEMA)},
    "json": {"guide_type": "json"},
    "regex": {"guide_type": "regex", "guide": "[A-Za-z ,.]{50,400}"},
    "bad (8 strings)": {"bad": ("the", "and", "king", "queen", "love", "death", "crown", "night")},
}
NUM_TOKENS = 150
STEP_S = 0.02


def main() -> None:
    """One JSON line for each case."""
    torch.set_num_threads(1)
    tokenizer, width = AutoTokenizer.from_pretrained(sys.argv[1]), int(sys.argv[2])
    vocabulary = Vocabulary(tokenizer, width, [tokenizer.eos_token_id])
    begun = time.perf_counter()
    _ = vocabulary.grammars
    build_s = time.perf_counter() - begun
    begun = time.perf_counter()
    vocabulary.bytes_of(0)
    table_s = time.perf_counter() - begun
    constrainer = Constrainer(vocabulary, width)
    for name, params in CASES.items():
        record = {
            "case": name,
            "vocab_size": width,
            "tokenizer": Path(sys.argv[1]).name,
            "vocabulary_s": round(build_s, 3),
            "byte_table_s": round(table_s, 3),
            **measure(constrainer, SamplingParams(temperature=1.0, seed=1, **params), width),
            "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
            "versions": {package: version(package) for package in ("llguidance", "torch", "transformers")},
        }
        line = json.dumps(record, ensure_ascii=False)
        print(line)
        if len(sys.argv) > 3:
            with Path(sys.argv[3]).open("a", encoding="utf-8") as output:
                output.write(line + "\n")
    constrainer.close()


def measure(constrainer: Constrainer, params: SamplingParams, width: int) -> dict[str, Any]:
    """Milliseconds to compile, and for each token."""
    begun = time.perf_counter()
    constraint = constrainer.of(params)[0]
    compile_ms = (time.perf_counter() - begun) * 1e3
    masks: list[float] = []
    record_masks(constraint, masks)
    state = SamplerState(params, [1], width, torch.device("cpu"), (), [constraint])
    generator = torch.Generator().manual_seed(0)
    forbid_ms, accept_ms = [], []
    for _ in range(NUM_TOKENS):
        logits = torch.randn(1, width, generator=generator) * 3
        # The executor's step, in which the mask is made.
        time.sleep(STEP_S)
        forbid_ms.append(timed(lambda logits=logits: constraint.forbid(logits[0])))
        token = sample(logits, [state])[0].token_id
        if token is None:
            break
        accept_ms.append(timed(lambda token=token: state.accept(token)))
        if state.complete:
            break
    return {
        "tokens": len(accept_ms),
        "compile_ms": round(compile_ms, 2),
        "mask_ms": summary(masks),
        "forbid_ms": summary(forbid_ms),
        "accept_ms": summary(accept_ms),
    }


def record_masks(constraint: Any, masks: list[float]) -> None:
    """Have a guide note how long each of its masks takes."""
    compute = getattr(constraint, "_allowed", None)
    if compute is None:
        return

    def recording() -> torch.Tensor:
        begun = time.perf_counter()
        allowed = compute()
        masks.append((time.perf_counter() - begun) * 1e3)
        return allowed

    constraint._allowed = recording


def timed(call: Any) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    call()
    return (time.perf_counter() - begun) * 1e3


def summary(values: list[float]) -> dict[str, float]:
    """p50 and maximum."""
    return {"p50": round(statistics.median(values), 3), "max": round(max(values), 3)} if values else {}


if __name__ == "__main__":
    main()
