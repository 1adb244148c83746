"""The TensorRT network that is compiled computes what the reference executor computes.

The interpreter evaluates the network definition itself, in float32 in place of 16 bit so that nothing but the order
of sums differs; the reference executor runs `TorchOps` in float32. Prompts are prefilled in chunks with padding behind
them, then decoded beside an idle slot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEEPSEEK_LITE, executor_of, make_checkpoint, rank_tensors, some_tokens

pytest.importorskip("tensorrt_rtx")

from interpreted_engine import InterpretedEngine, deviation, steps

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.tensorrt import experts as tensorrt_experts
from trtbuild.engines.tensorrt.bindings import Binding, WeightSource
from trtbuild.engines.tensorrt.graph import NONE, ElementWise, Graph
from trtbuild.engines.tensorrt.ops import TensorRTOps

LIMITS = EngineLimits(max_batch_size=4, max_seq_len=112, chunk_size=80)
WINDOW = 9
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-moe": ("qwen2_moe", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3_moe", {}),
    "deepseek-v2": ("deepseek_v2", {}),
    "deepseek-v2-lite": ("deepseek_v2", DEEPSEEK_LITE),
}
PRECISIONS = ["fp16", "bf16", "fp8", "int8", "int4"]
LAYOUTS = {"tp1": Layout.resolve(), "tp2": Layout.resolve(tp=2), "ep2": Layout.resolve(tp=2, moe_ep=2)}
FORMS = ["conditional", "routed", "dense"]
# Quantizing an activation turns a difference in the last bit of float32 into one step of fp8 now and then.
TOLERANCES = {"fp8": 0.05}
# Measured: at most 1.2e-5, and 2e-6 in fp8 where nothing flipped.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointSource]:
    root = tmp_path_factory.mktemp("hf")
    made = {
        name: make_checkpoint(root / name, family, num_hidden_layers=2, **changes)
        for name, (family, changes) in FAMILIES.items()
    }
    return {name: CheckpointSource.open(str(directory)) for name, directory in made.items()}


def engines(source: CheckpointSource, precision: Any, layout: Layout, **options: Any) -> tuple[InterpretedEngine, Any]:
    """The interpreted TensorRT engine and the reference executor over the same rank tensors."""
    wanted = Precision.resolve(precision, source.config.dtype)
    plans = [plan_rank(source.config, rank, wanted) for rank in layout.ranks()]
    amax = {linear.global_name: 6.0 for linear in plans[0].linears}
    tensors = rank_tensors(source, layout, precision, amax)
    reference = executor_of(
        source,
        layout,
        precision,
        read=lambda rank, name: tensors[rank][name],
        max_seq_len=LIMITS.max_seq_len,
        chunk_size=LIMITS.chunk_size,
    )
    options.setdefault("embed", precision == "int4")
    return InterpretedEngine(plans, tensors, LIMITS, **options), reference


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_network_equals_torch_ops(
    sources: dict[str, CheckpointSource], family: str, precision: str, layout: str
) -> None:
    pairs = steps(*engines(sources[family], precision, LAYOUTS[layout]))
    assert deviation(pairs) < TOLERANCES.get(precision, TOLERANCE)
    assert min(float(expected.std()) for _, expected in pairs) > 0.5, "logits too flat to tell anything"


@pytest.mark.parametrize("layout", ["tp1", "tp2", "ep2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
def test_moe_forms_equal_torch_ops(
    sources: dict[str, CheckpointSource], form: str, precision: str, layout: str
) -> None:
    pairs = steps(*engines(sources["mixtral"], precision, LAYOUTS[layout], moe_form=form))
    assert deviation(pairs) < TOLERANCES.get(precision, TOLERANCE)


def test_routed_loop_takes_several_turns(sources: dict[str, CheckpointSource], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_experts, "TILE_ROWS", 8)
    pairs = steps(*engines(sources["mixtral"], "bf16", LAYOUTS["ep2"], moe_form="routed"))
    assert deviation(pairs) < TOLERANCE


@pytest.mark.parametrize("precision", ["fp8", "fp16"])
def test_embedded_weights_hold_the_same_values(sources: dict[str, CheckpointSource], precision: str) -> None:
    pairs = steps(*engines(sources["mixtral"], precision, LAYOUTS["tp2"], embed=True))
    assert deviation(pairs) < TOLERANCES.get(precision, TOLERANCE)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", ["llama-biases", "mistral-window"])
def test_declared_types(sources: dict[str, CheckpointSource], family: str, precision: str) -> None:
    """In the layers' own types, 16 bit included, the logits stay near those of float32."""
    pairs = steps(*engines(sources[family], precision, LAYOUTS["tp1"], wide=False))
    for found, expected in pairs:
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=-1)
        assert float(cosine.min()) > (0.97 if precision == "fp8" else 0.995), cosine


@pytest.mark.parametrize("form", FORMS)
def test_an_overflow_in_an_expert_reaches_only_its_tokens(tmp_path: Path, form: str) -> None:
    """Expert 1 gives NaN for every token; tokens that did not choose it must not see it, not even multiplied by 0."""
    source = CheckpointSource.open(str(make_checkpoint(tmp_path / "hf", "mixtral", num_hidden_layers=1)))
    engine, _ = engines(source, "bf16", LAYOUTS["tp1"], moe_form=form)
    tokens = some_tokens(40, seed=3)
    clean = engine.prefill(0, tokens, 0)
    engine.edit = lambda binding, tensor: (
        tensor * float("nan") if binding.name.endswith("mlp.proj.1.weight") else tensor
    )
    broken = engine.prefill(0, tokens, 0)
    hurt = broken.isnan().any(-1)
    assert 5 < int(hurt.sum()) < 35
    assert torch.equal(broken[~hurt], clean[~hurt])


MUTATIONS = ["swap-gate-and-up", "transpose", "drop-bias", "swap-expert-halves"]


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_fault_in_the_emitted_network_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str) -> None:
    family = "mixtral" if mutation == "swap-expert-halves" else "llama"
    changes = {} if family == "mixtral" else {"attention_bias": True, "head_dim": 8}
    source = CheckpointSource.open(str(make_checkpoint(tmp_path / "hf", family, num_hidden_layers=2, **changes)))
    assert deviation(steps(*engines(source, "bf16", LAYOUTS["tp1"]))) < TOLERANCE
    {"swap-gate-and-up": _swap_gate_and_up, "transpose": _transpose_square, "drop-bias": _drop_bias,
     "swap-expert-halves": _swap_halves}[mutation](monkeypatch)  # fmt: skip
    assert deviation(steps(*engines(source, "bf16", LAYOUTS["tp1"]))) > 100 * TOLERANCE


def _swap_gate_and_up(monkeypatch: pytest.MonkeyPatch) -> None:
    original = TensorRTOps.linear
    swapped = {"fc": "gate", "gate": "fc"}

    def linear(self: TensorRTOps, x: Any, name: str) -> Any:
        head, dot, last = name.rpartition(".")
        return original(self, x, head + dot + swapped.get(last, last))

    monkeypatch.setattr(TensorRTOps, "linear", linear)


def _transpose_square(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Graph.matmul

    def matmul(self: Graph, a: Any, b: Any, b_op: Any = NONE) -> Any:
        return original(self, a, b, NONE if b.shape[0] == b.shape[1] else b_op)

    monkeypatch.setattr(Graph, "matmul", matmul)


def _drop_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorRTOps, "add_bias", lambda self, x, name: x)


def _swap_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Graph.silu
    monkeypatch.setattr(Graph, "silu", lambda self, x: x)
    monkeypatch.setattr(
        Graph,
        "multiply",
        lambda self, a, b: Graph.elementwise(self, a, original(self, b) if _is_half(b) else b, ElementWise.PROD),
    )


def _is_half(x: Any) -> bool:
    """The up half of an expert's fused product: the only bf16 [rows, 128] that a multiply sees."""
    return len(x.shape) == 2 and x.shape[1] == 128 and x.dtype.name == "BF16"


def test_bindings_survive_json() -> None:
    binding = Binding("w", "weight", "float8_e4m3", (4, "S"), WeightSource("transpose", ("layers.0.w",), 3))
    assert Binding.from_dict(json.loads(json.dumps(binding.to_dict()))) == binding
