"""`--precision auto`: a format for each linear layer, for the least loss in the given bytes.

Each layer's formats are points (bytes, cost). Of those on the lower convex hull, the steps from a smaller format to a
larger one are taken in the order of what they gain for a byte: the optimum of the relaxed problem, which whole
steps miss by less than one step.

Costs are estimates: on Qwen2.5-Coder 0.5B a mixture that promised 13 % less than uniform int8 in the same bytes lost
5 % more. One that rounds some layers more than a uniform format does, to pay for others, must promise a quarter less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from trtbuild.checkpoints.precision import FormatName
from trtbuild.engines.calibration.sensitivity import Sensitivity, total
from trtbuild.errors import Refused
from trtbuild.units import format_bytes

_MIN_PROMISE = 0.25


@dataclass(frozen=True)
class Step:
    """Going from one format of a linear layer to the next larger one."""

    linear: str
    format: FormatName
    num_bytes: int
    gain: float


def hull(sizes: Mapping[FormatName, int], costs: Mapping[FormatName, float]) -> list[FormatName]:
    """The formats on the lower convex hull, from the smallest on: each costs less than the one before."""
    points = sorted(sizes, key=lambda name: (sizes[name], costs.get(name, 0.0)))
    kept: list[FormatName] = []
    for name in points:
        cost, size = costs.get(name, 0.0), sizes[name]
        if kept and cost >= costs.get(kept[-1], 0.0):
            continue
        while len(kept) > 1:
            first, middle = kept[-2], kept[-1]
            slope = (costs.get(middle, 0.0) - costs.get(first, 0.0)) / (sizes[middle] - sizes[first])
            if (cost - costs.get(first, 0.0)) / (size - sizes[first]) > slope:
                break
            kept.pop()
        kept.append(name)
    return kept


def steps(sizes: Mapping[str, Mapping[FormatName, int]], sensitivity: Sensitivity) -> list[Step]:
    """Every layer's steps along its hull, the best first; a layer's own come in order."""
    found: list[tuple[float, int, Step]] = []
    for linear, by_format in sizes.items():
        costs = sensitivity[linear]
        path = hull(by_format, costs)
        for before, after in pairwise(path):
            num_bytes = by_format[after] - by_format[before]
            gain = costs.get(before, 0.0) - costs.get(after, 0.0)
            found.append((-gain / num_bytes, len(found), Step(linear, after, num_bytes, gain)))
    return [step for _, _, step in sorted(found, key=lambda entry: entry[:2])]


def choose(
    sizes: Mapping[str, Mapping[FormatName, int]],
    sensitivity: Sensitivity,
    *,
    room: int | None = None,
    max_cost: float | None = None,
) -> dict[str, FormatName]:
    """A format for each linear layer, within `room` bytes, and no larger than `max_cost` (nats a token) asks for.

    Raises Refused where even the smallest formats do not fit, or the cost is not reached in the room.
    """
    chosen: dict[str, FormatName] = {
        linear: hull(by_format, sensitivity[linear])[0] for linear, by_format in sizes.items()
    }
    used = sum(sizes[linear][name] for linear, name in chosen.items())
    if room is not None and used > room:
        raise Refused(
            f"--budget leaves {format_bytes(max(0, room))} for the linear layers of a rank, which take "
            f"{format_bytes(used)} at least"
        )
    cost = total(sensitivity, chosen)
    blocked: set[str] = set()
    for step in steps(sizes, sensitivity):
        if max_cost is not None and cost <= max_cost:
            break
        if step.linear in blocked or (room is not None and used + step.num_bytes > room):
            # Its later steps build on this one.
            blocked.add(step.linear)
            continue
        chosen[step.linear] = step.format
        used, cost = used + step.num_bytes, cost - step.gain
    if max_cost is not None and cost > max_cost:
        raise Refused(
            f"--max-loss: {cost:.4g} nats a token are lost in the given bytes, {max_cost:.4g} are allowed; "
            "give a larger --budget, or allow more"
        )
    return chosen if room is None or max_cost is not None else _worth_it(chosen, sizes, sensitivity, room)


def _worth_it(
    chosen: dict[str, FormatName], sizes: Mapping[str, Mapping[FormatName, int]], sensitivity: Sensitivity, room: int
) -> dict[str, FormatName]:
    """`chosen`, or the best uniform format in `room` where `chosen` goes below it in places and promises little."""
    fitting: list[FormatName] = [
        name
        for name in next(iter(sizes.values()))
        if all(name in by_format for by_format in sizes.values())
        and sum(by_format[name] for by_format in sizes.values()) <= room
    ]
    if not fitting:
        return chosen
    uniforms: dict[FormatName, float] = {
        name: sum(sensitivity[linear].get(name, 0.0) for linear in sizes) for name in fitting
    }
    best = min(fitting, key=uniforms.__getitem__)
    goes_below = any(sizes[linear][name] < sizes[linear][best] for linear, name in chosen.items())
    if goes_below and uniforms[best] - total(sensitivity, chosen) < _MIN_PROMISE * uniforms[best]:
        return {linear: best for linear in chosen}  # noqa: C420  fromkeys loses the literal type
    return chosen
