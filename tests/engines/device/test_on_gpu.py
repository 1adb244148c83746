"""TensorRT itself, on a GPU that it has a target for: the engine's logits are the reference executor's.

`pytest -m gpu`. Elsewhere skipped, with the reason; `perf/gpu_check.py` tries also where TensorRT-RTX lists no target.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import some_tokens

from trtbuild.engines.device.gpu import find_gpus
from trtbuild.engines.tensorrt.targets import TARGETS


def _why_not() -> str:
    gpus = find_gpus()
    if not gpus:
        return "torch sees no CUDA GPU"
    return "" if gpus[0].target in TARGETS else f"TensorRT-RTX has no target {gpus[0].target} ({gpus[0].name})"


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "there is a GPU")]
VOCAB = 1000
# 16-bit arithmetic against float32; fp8 besides rounds every activation.
COSINE = {"fp16": 0.999, "int4": 0.995, "fp8": 0.97}


@pytest.mark.parametrize("precision", COSINE)
def test_logits_equal_the_reference(tmp_path: Path, precision: str) -> None:
    from trtbuild.engines.compile import compile_engine
    from trtbuild.engines.job import Job
    from trtbuild.engines.load import load_engine
    from trtbuild.engines.recipe import Recipe
    from trtbuild.workspace import Workspace

    target = (find_gpus()[0].target,)
    recipe = Recipe.create(model="tiny-mixtral", precision=precision, target=target, max_batch_size=4, max_seq_len=256)
    directory = compile_engine(Job.resolve(recipe), Workspace(tmp_path)).directory
    device = load_engine(directory, executor="tensorrt").executor
    reference = load_engine(directory, executor="reference", dtype="float32").executor
    tokens = some_tokens(100, VOCAB)
    found, expected = [], []
    for engine, logits in ((device, found), (reference, expected)):
        logits.append(engine.prefill(2, tokens[:70], 0, "all"))
        logits.append(engine.prefill(0, tokens[:5], 0, "all"))
        logits.append(engine.prefill(2, tokens[70:], 70, "all"))
        logits += [engine.decode([0, 2], [7, 11], [5 + i, 100 + i]) for i in range(3)]
    for a, b in zip(found, expected, strict=True):
        cosine = torch.nn.functional.cosine_similarity(a.float().cpu(), b.float().cpu(), dim=-1)
        assert float(cosine.min()) > COSINE[precision]
    device.close()
    reference.close()
