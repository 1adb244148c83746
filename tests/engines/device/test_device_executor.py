"""The TensorRT executor gives the reference executor's logits, over a runtime that evaluates the plans' networks.

Everything but the GPU is real: slots, write indices, cache addresses, idle slots, padding, phases, shared plans and
buffers, ranks in lockstep. The contexts read and write raw memory (`fake_tensorrt.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from crafted_tensors import craft_ranks
from helpers import make_checkpoint, some_tokens

pytest.importorskip("tensorrt_rtx")

from device_engines import LIMITS, Ranks

from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.engines.device import rank_runner, steps
from trtbuild.engines.limits import EngineLimits

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
}
LAYOUTS = {"tp1": Layout.resolve(), "tp2": Layout.resolve(tp=2), "ep2": Layout.resolve(tp=2, moe_ep=2)}
# Quantizing an activation turns a difference in the last bit of float32 into one step of fp8 now and then.
TOLERANCES = {"fp8": 0.05}
TOLERANCE = 1e-4
MIXED_TOLERANCE = 0.1
CASES = [
    ("llama", "bf16", "tp1"), ("llama", "fp8", "tp1"), ("llama", "int4", "tp2"), ("mistral-window", "fp16", "tp1"),
    ("qwen2", "int8", "tp1"), ("mixtral", "fp16", "tp1"), ("mixtral", "int4", "ep2"), ("mixtral", "fp8", "ep2"),
    ("qwen3_moe", "bf16", "tp2"), ("deepseek_v2", "bf16", "tp2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CheckpointSource]:
    root = tmp_path_factory.mktemp("hf")
    made = {n: make_checkpoint(root / n, f, num_hidden_layers=3, **c) for n, (f, c) in FAMILIES.items()}
    return {name: CheckpointSource.open(str(directory)) for name, directory in made.items()}


def steps_of(engine: Any) -> list[torch.Tensor]:
    """Logits of prompts in several slots, interleaved with decodes that leave slots idle, and of a reused prefix."""
    long, short, other = some_tokens(90, seed=3), some_tokens(5, seed=4), some_tokens(20, seed=5)
    found = [engine.prefill(1, long[:70], 0, "all"), engine.prefill(0, short, 0)]
    found.append(engine.decode([0], [7], [5]))
    found.append(engine.prefill(1, long[70:], 70, "all"))
    assert engine.prefill(2, other, 0, "none") is None
    for i in range(2):
        found.append(engine.decode([2, 1], [11 + i, 13 + i], [20 + i, 90 + i]))
    found.append(engine.decode([1, 0, 2], [3, 4, 5], [92, 6, 22]))
    # Slot 2 keeps its first 8 tokens; what follows is another prompt.
    found.append(engine.prefill(2, short, 8))
    found.append(engine.decode([2], [9], [13]))
    return found


def deviation(engine: Any, reference: Any) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(steps_of(engine), steps_of(reference), strict=True))


@pytest.mark.parametrize(("family", "layout"), [("llama", "tp1"), ("mixtral", "ep2")])
def test_layers_of_different_formats(tmp_path: Path, family: str, layout: str) -> None:
    """One segment is embedded, with a profile for each phase; the others take weights as inputs, in a plan for each."""
    int4, dynamic, int8 = LinearForm("int4", zeros=True), LinearForm("fp8-dynamic"), LinearForm("int8")
    rows = LinearForm("fp8", row_scales=True)
    forms = {"0.attention": int8, "0.mlp.fc": int8, "0.mlp": int4, "1.attention": rows, "1.mlp.proj": int8, "": dynamic}
    # Weights with which no activation lies between two e4m3 values, to fall either way.
    directory = make_checkpoint(tmp_path / "hf", family, num_hidden_layers=3, seed=1)
    source = CheckpointSource.open(str(directory))
    crafted = craft_ranks(source, LAYOUTS[layout], forms)
    ranks = Ranks(source, layout=LAYOUTS[layout], crafted=crafted)
    assert {record.phase for record in ranks.records if record.kind == "decoder"} == {"any", "prefill", "decode"}
    assert deviation(ranks.executor(), ranks.reference()) < MIXED_TOLERANCE


@pytest.mark.parametrize(("family", "precision", "layout"), CASES)
def test_logits_equal_the_reference(
    sources: dict[str, CheckpointSource], family: str, precision: str, layout: str
) -> None:
    ranks = Ranks(sources[family], precision, LAYOUTS[layout])
    executor = ranks.executor()
    assert deviation(executor, ranks.reference()) < TOLERANCES.get(precision, TOLERANCE)
    executor.close()


def test_the_last_position_of_a_slot(sources: dict[str, CheckpointSource]) -> None:
    """Padding reaches past max_seq_len, and idle slots write there, without a trace."""
    ranks = Ranks(sources["llama"])
    executor, reference = ranks.executor(), ranks.reference()
    tokens = some_tokens(LIMITS.max_seq_len, seed=8)
    for engine in (executor, reference):
        engine.prefill(1, tokens[:80], 0, "none")
        engine.prefill(0, tokens[:3], 0, "none")
    found, expected = (engine.prefill(1, tokens[80:111], 80) for engine in (executor, reference))
    assert found is not None
    assert expected is not None
    assert torch.allclose(found, expected, atol=TOLERANCE)
    for engine in (executor, reference):
        engine.decode([0], [4], [3])
    last, wanted = (engine.decode([1], [tokens[111]], [111]) for engine in (executor, reference))
    assert torch.allclose(last, wanted, atol=TOLERANCE)
    with pytest.raises(ValueError, match="max_seq_len is 112"):
        executor.decode([1], [5], [112])


def test_embeddings_in_place_of_tokens(sources: dict[str, CheckpointSource]) -> None:
    ranks = Ranks(sources["qwen2"])
    executor = ranks.executor()
    tokens = some_tokens(21, seed=6)
    table = ranks.tensors[0]["transformer.vocab_embedding.weight"].float()
    expected = executor.prefill(0, tokens, 0)
    found = executor.prefill(1, [0] * 21, 0, embeddings=table[tokens])
    plain = executor.prefill(2, [0] * 21, 0)
    assert found is not None
    assert expected is not None
    assert plain is not None
    assert torch.equal(found, expected)
    assert not torch.allclose(found, plain, atol=0.1)
    with pytest.raises(ValueError, match=r"\[20, 64\], these tokens need \[21, 64\]"):
        executor.prefill(0, tokens, 0, embeddings=table[tokens[:20]])


def test_plans_are_deserialized_once_and_contexts_are_one_for_each_segment(
    sources: dict[str, CheckpointSource],
) -> None:
    ranks = Ranks(sources["llama"])
    ranks.executor()
    # embed, head, and a prefill and a decode plan that the three layers share.
    assert (len(ranks.records), ranks.trts[0].num_deserialized) == (4, 4)
    assert len(ranks.trts[0].contexts) == 2 * (1 + 3 + 1)
    assert len({context.scratch for context in ranks.trts[0].contexts}) == 1


def test_weights_are_on_the_device_once(sources: dict[str, CheckpointSource]) -> None:
    ranks = Ranks(sources["mixtral"], "fp8")
    weights = sum(tensor.nbytes for tensor in ranks.tensors[0].values())
    tables = 2 * 4 * LIMITS.cache_capacity * 8
    # Scales become one float32 for each expert; nothing else is there twice.
    assert ranks.runners[0]._weights.nbytes == pytest.approx(weights + tables, rel=0.01)


def test_decode_addresses_and_shapes_never_change(sources: dict[str, CheckpointSource]) -> None:
    ranks = Ranks(sources["llama"])
    executor = ranks.executor()
    decoding = [c for c in ranks.trts[0].contexts if c.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"]
    assert len(decoding) == 5
    steps_of(executor)
    first = [dict(context.addresses) for context in decoding]
    steps_of(executor)
    assert [context.addresses for context in decoding] == first
    assert all(len({tuple(sorted(shapes.items())) for shapes in c.shapes_run}) == 1 for c in decoding)


def test_no_graphs_where_a_plan_of_the_chain_cannot_be_captured(sources: dict[str, CheckpointSource]) -> None:
    ranks = Ranks(sources["mixtral"])
    ranks.executor()
    assert {c.config.cuda_graph_strategy.name for c in ranks.trts[0].contexts} == {"DISABLED"}


def test_few_prefill_shapes(sources: dict[str, CheckpointSource]) -> None:
    assert steps.padded_lengths(80) == [16, 32, 64, 80]
    assert [steps.padded_length(n, 80) for n in (1, 16, 17, 65, 80)] == [16, 16, 32, 80, 80]
    assert steps.padded_lengths(5) == [5]
    ranks = Ranks(sources["llama"])
    executor = ranks.executor()
    for length in (1, 3, 16, 18, 33, 64, 70):
        executor.prefill(0, some_tokens(length), 0)
    prefilling = ranks.trts[0].contexts[1]
    assert [shapes["hidden"][1] for shapes in prefilling.shapes_run] == [16, 16, 16, 32, 64, 64, 80]


@pytest.mark.parametrize("mutation", ["slot-offset", "idle-write", "active", "one-hidden", "lengths", "head-row"])
def test_a_fault_in_the_executor_shows(
    sources: dict[str, CheckpointSource], monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    """What the comparison is there to find, one fault at a time."""
    _break(mutation, monkeypatch)
    ranks = Ranks(sources["mixtral" if mutation == "active" else "llama"])
    executor = ranks.executor()
    try:
        found = deviation(executor, ranks.reference())
    except AssertionError as error:
        # What the fake runtime notices by itself.
        assert mutation == "one-hidden", error
        assert "lies on the input" in str(error)
        return
    assert not found < 100 * TOLERANCE


def _break(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = steps.step_inputs

    def changed(step: steps.Step, num_slots: int, limits: EngineLimits) -> steps.StepInputs:
        found = inputs(step, num_slots, limits)
        if mutation == "idle-write" and step.phase == "decode":
            idle = [slot for slot in range(num_slots) if slot not in step.slots]
            found.values["write_index"][idle] = 0
        if mutation == "active":
            found.values["active"][:] = 0
        if mutation == "lengths" and step.phase == "prefill":
            found.values["key_value_lengths"][0] = step.positions[0] + len(step.tokens)
        return found

    monkeypatch.setattr(rank_runner, "step_inputs", changed)
    if mutation == "slot-offset":
        address = rank_runner.SlotCaches.address
        monkeypatch.setattr(rank_runner.SlotCaches, "address", lambda self, served, slot: address(self, served, 0))
    if mutation == "one-hidden":
        hidden = rank_runner.StepBuffers.hidden
        monkeypatch.setattr(rank_runner.StepBuffers, "hidden", lambda self, parity: hidden(self, 0))
    if mutation == "head-row":
        monkeypatch.setattr(rank_runner.RankRunner, "_read_logits", lambda self, head, size, num_rows: self.device.read(
            self._buffers.view("logits", (size, self.vocab_size))[-num_rows:]))  # fmt: skip


def test_wrong_steps_are_refused(sources: dict[str, CheckpointSource]) -> None:
    executor = Ranks(sources["llama"]).executor(num_slots=2)
    for call, message in (
        (lambda: executor.prefill(0, [], 0), "1 to 80 tokens, not 0"),
        (lambda: executor.prefill(0, [1] * 81, 0), "1 to 80 tokens, not 81"),
        (lambda: executor.prefill(2, [1], 0), "slot 2 is outside 0..1"),
        (lambda: executor.prefill(0, [1, 2], 111), "max_seq_len is 112"),
        (lambda: executor.decode([0, 0], [1, 1], [0, 1]), "distinct slots"),
        (lambda: executor.decode([], [], []), "distinct slots"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_types_of_the_plans(sources: dict[str, CheckpointSource], tmp_path: Path) -> None:
    """In 16 bit, as on a GPU, logits stay near those of float32."""
    ranks = Ranks(sources["llama"], "bf16", wide=False)
    found, expected = steps_of(ranks.executor()), steps_of(ranks.reference())
    for a, b in zip(found, expected, strict=True):
        assert float(torch.nn.functional.cosine_similarity(a, b, dim=-1).min()) > 0.995
