"""Every form of linear layer, and mixtures of them: the TensorRT network computes what the reference executor does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_tensors import craft_ranks
from helpers import make_checkpoint

pytest.importorskip("tensorrt_rtx")

from interpreted_engine import InterpretedEngine, deviation, steps

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.engines.tensorrt import weights as tensorrt_weights
from trtbuild.engines.tensorrt.graph import Graph

LIMITS = EngineLimits(max_batch_size=4, max_seq_len=112, chunk_size=80)
TP1, TP2, EP2 = Layout.resolve(), Layout.resolve(tp=2), Layout.resolve(tp=2, moe_ep=2)
INT4, ZEROS, ORDER = LinearForm("int4"), LinearForm("int4", 32, zeros=True), LinearForm("int4", order=True)
DYNAMIC, ROWS, STATIC = LinearForm("fp8-dynamic"), LinearForm("fp8", row_scales=True), LinearForm("fp8")
INT8, PLAIN = LinearForm("int8"), LinearForm("bf16")
FORMS: dict[str, dict[str, LinearForm]] = {
    "dynamic": {"": DYNAMIC},
    "rows": {"": ROWS},
    "zeros": {"": ZEROS},
    "order": {"mlp.fc": INT4, "mlp.proj": INT4, "mlp.shared_expert": ORDER, "": ORDER},
    # Of two layers, one is int4 and embedded beside all other formats; the other takes its weights as inputs.
    "mixed": {
        "layers.0.attention.dense": PLAIN, "layers.0.attention": INT8, "layers.0.mlp.fc": ZEROS,
        "layers.0.mlp.gate": STATIC, "layers.0.mlp.shared_expert": ROWS, "layers.0.mlp.proj": DYNAMIC,
        "layers.1.attention": DYNAMIC, "layers.1.mlp.proj": ROWS, "layers.1": INT8,
    },
    "int8-experts-beside-int4": {"attention": INT4, "mlp.fc": INT8, "": DYNAMIC},
}  # fmt: skip
# A last bit of float32 becomes one step of e4m3 now and then, most of all where bf16 embeddings make values that lie
# exactly between two of them. With these weights: at most 0.052, and 5e-6 in most cases.
SEED = 1
TOLERANCES = {"zeros": 1e-4, "order": 1e-4}
FP8_TOLERANCE = 0.1


def engines(
    tmp_path: Path, family: str, forms: dict[str, LinearForm], layout: Layout, **options: Any
) -> tuple[InterpretedEngine, ReferenceExecutor]:
    """The interpreted TensorRT engine and the reference executor over the same rank tensors."""
    directory = make_checkpoint(tmp_path / "hf", family, seed=SEED, num_hidden_layers=2, mlp_only_layers=[])
    ranks = craft_ranks(CheckpointSource.open(str(directory)), layout, forms)
    read = lambda rank, name: ranks.tensors[rank][name]  # noqa: E731
    reference = ReferenceExecutor(ranks.plans, read, LIMITS, dtype=torch.float32)
    return InterpretedEngine(ranks.plans, ranks.tensors, LIMITS, **options), reference


@pytest.mark.parametrize(
    ("family", "name", "layout", "form"),
    [
        *(("llama", name, layout, None) for name in ("dynamic", "rows", "zeros", "mixed") for layout in (TP1, TP2)),
        ("llama", "order", TP1, None),
        *(("mixtral", name, EP2, form) for name in ("dynamic", "zeros") for form in ("conditional", "routed", "dense")),
        ("mixtral", "rows", TP2, "routed"),
        ("mixtral", "mixed", TP2, None),
        ("mixtral", "int8-experts-beside-int4", TP2, "conditional"),
        ("qwen2_moe", "dynamic", TP1, None),
        ("qwen2_moe", "mixed", TP2, None),
        ("qwen2_moe", "order", TP1, None),
        ("deepseek_v2", "dynamic", TP2, None),
        ("deepseek_v2", "mixed", TP1, None),
    ],
)
def test_network_equals_torch_ops(tmp_path: Path, family: str, name: str, layout: Layout, form: str | None) -> None:
    pairs = steps(*engines(tmp_path, family, FORMS[name], layout, moe_form=form))
    assert deviation(pairs) < TOLERANCES.get(name, FP8_TOLERANCE)
    assert min(float(expected.std()) for _, expected in pairs) > 0.5, "logits too flat to tell anything"


@pytest.mark.parametrize("name", ["dynamic", "rows", "int8-experts-beside-int4"])
def test_embedded_weights_hold_the_same_values(tmp_path: Path, name: str) -> None:
    pairs = steps(*engines(tmp_path, "mixtral", FORMS[name], TP1, embed=True))
    assert deviation(pairs) < FP8_TOLERANCE


@pytest.mark.parametrize("name", ["dynamic", "zeros", "order", "mixed"])
def test_declared_types(tmp_path: Path, name: str) -> None:
    """In the layers' own types, 16 bit included, the logits stay near those of float32."""
    for found, expected in steps(*engines(tmp_path, "llama", FORMS[name], TP1, wide=False)):
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert float(cosine.min()) > (0.995 if name in TOLERANCES else 0.97), cosine


@pytest.mark.parametrize("mutation", ["another-maximum", "scale-for-zero", "drop-order"])
def test_a_fault_in_a_form_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    name = {"another-maximum": "dynamic", "scale-for-zero": "zeros", "drop-order": "order"}[mutation]
    engine, reference = engines(tmp_path, "llama", FORMS[name], TP1)
    if mutation == "another-maximum":
        # Scales that are not those of the token: values saturate.
        monkeypatch.setattr(tensorrt_weights, "FP8_MAX", 4480.0)
    elif mutation == "scale-for-zero":
        original, other = tensorrt_weights.Weights._part, "weights_scaling_factor"
        monkeypatch.setattr(
            tensorrt_weights.Weights, "_part",
            lambda self, name, part, *rest: original(self, name, part.replace("zero", other), *rest),
        )  # fmt: skip
    else:
        gather = Graph.gather
        monkeypatch.setattr(Graph, "gather", lambda self, x, rows, axis=0: x if axis else gather(self, x, rows))
    assert deviation(steps(engine, reference)) > 0.3
