"""The chosen mixture against brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from trtbuild.checkpoints.precision import FormatName
from trtbuild.engines.calibration.mixture import choose, hull
from trtbuild.engines.calibration.sensitivity import Sensitivity, total
from trtbuild.errors import Refused

FORMATS: tuple[FormatName, ...] = ("int4", "int8", "fp8-dynamic", "bf16")
Sizes = dict[str, dict[FormatName, int]]


def random_problem(seed: int, count: int = 5) -> tuple[Sizes, Sensitivity]:
    """Layers of several sizes and costs; int8 and fp8 take the same bytes."""
    generator = random.Random(seed)
    sizes: Sizes = {}
    costs: Sensitivity = {}
    for index in range(count):
        width, cost = generator.choice([10, 10, 30, 80]), 10 ** generator.uniform(-4, -1)
        sizes[f"layer{index}"] = {"int4": 4 * width, "int8": 8 * width, "fp8-dynamic": 8 * width, "bf16": 16 * width}
        int8, fp8 = (cost * generator.uniform(0.001, 0.4) for _ in range(2))
        costs[f"layer{index}"] = {"int4": cost, "int8": int8, "fp8-dynamic": fp8}
    return sizes, costs


def best_cost(sizes: Sizes, costs: Sensitivity, room: int) -> float:
    found = []
    for formats in itertools.product(FORMATS, repeat=len(sizes)):
        chosen = dict(zip(sizes, formats, strict=True))
        if sum(sizes[name][form] for name, form in chosen.items()) <= room:
            found.append(total(costs, chosen))
    return min(found)


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_mixtures_in_the_bytes(seed: int) -> None:
    sizes, costs = random_problem(seed)
    smallest, largest = (sum(by_format[form] for by_format in sizes.values()) for form in ("int4", "bf16"))
    uniform = total(costs, dict.fromkeys(sizes, "int4"))
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        room = int(smallest + share * (largest - smallest))
        chosen = choose(sizes, costs, room=room)
        assert sum(sizes[name][form] for name, form in chosen.items()) <= room
        # Whole steps miss the relaxed optimum by less than the costliest of them.
        assert total(costs, chosen) <= best_cost(sizes, costs, room) + max(cost["int4"] for cost in costs.values())
        assert total(costs, chosen) <= uniform
    assert set(choose(sizes, costs, room=largest).values()) == {"bf16"}


def test_more_bytes_never_cost_more() -> None:
    sizes, costs = random_problem(99, count=12)
    smallest = sum(by_format["int4"] for by_format in sizes.values())
    losses = [total(costs, choose(sizes, costs, room=smallest + extra)) for extra in range(0, 2000, 40)]
    assert losses[0] > losses[-1]
    # A step that does not fit lets smaller ones in, which the next room may not take: hence the slack.
    assert all(after <= before * 1.2 for before, after in itertools.pairwise(losses))


@pytest.mark.parametrize(("loss", "expected"), [(0.9, "int8"), (0.6, "mixed")])
def test_a_layer_is_traded_down_only_for_a_quarter_of_the_loss(loss: float, expected: str) -> None:
    """Two layers at uniform int8's bytes: int4 and 16 bit together would lose `loss` of what int8 loses."""
    sizes: Sizes = {"small": {"int4": 4, "int8": 8, "bf16": 16}, "large": {"int4": 8, "int8": 16, "bf16": 32}}
    costs: Sensitivity = {
        "small": {"int4": 9.0, "int8": 0.5 + 0.5 - loss / 2},
        "large": {"int4": loss, "int8": loss / 2},
    }
    assert total(costs, dict.fromkeys(sizes, "int8")) == pytest.approx(1.0)
    chosen = choose(sizes, costs, room=24)
    assert chosen == ({"small": "bf16", "large": "int4"} if expected == "mixed" else dict.fromkeys(sizes, "int8"))


def test_as_few_bytes_as_the_loss_allows() -> None:
    sizes, costs = random_problem(5)
    all_int4 = total(costs, dict.fromkeys(sizes, "int4"))
    chosen = choose(sizes, costs, max_cost=all_int4 / 3)
    assert total(costs, chosen) <= all_int4 / 3
    assert set(choose(sizes, costs, max_cost=all_int4 * 1.01).values()) == {"int4"}


def test_a_format_that_is_larger_and_worse_is_never_taken() -> None:
    sizes: dict[FormatName, int] = {"int4": 4, "fp8-dynamic": 8, "int8": 8, "bf16": 16}
    assert hull(sizes, {"int4": 1.0, "fp8-dynamic": 0.3, "int8": 0.1}) == ["int4", "int8", "bf16"]
    assert hull({"int4": 4, "int8": 8}, {"int4": 1.0, "int8": 2.0}) == ["int4"]
    # Off the hull: bf16 gains far more for each byte than the way over int8.
    assert hull({"int4": 4, "int8": 8, "bf16": 16}, {"int4": 1.0, "int8": 0.9}) == ["int4", "bf16"]


def test_what_cannot_be_met_is_refused_with_both_numbers() -> None:
    sizes, costs = random_problem(1)
    with pytest.raises(Refused, match=r"--budget leaves 0\.0 MiB .* at least"):
        choose(sizes, costs, room=10)
    smallest = sum(by_format["int4"] for by_format in sizes.values())
    with pytest.raises(Refused, match=r"--max-loss: .* nats a token are lost"):
        choose(sizes, costs, room=smallest, max_cost=1e-9)
