"""Random JSON schemas: nested objects and arrays, enums, bounds, lengths, patterns, unions, references."""

from __future__ import annotations

import random
from typing import Any

LEAVES = 9
WORDS = ["name", "size", "tags", "wert", "名", "a b", 'q"uote', "x\\y", "n1", "n2"]


def random_schema(seed: int) -> dict[str, Any]:
    """An object at the top, as clients ask for."""
    rng = random.Random(seed)
    schema = _object(rng, depth=3)
    if rng.random() < 0.2:
        schema["$defs"] = {"leaf": _leaf(rng)}
        schema["properties"]["ref"] = {"$ref": "#/$defs/leaf"}
        schema["required"] = [*schema["required"], "ref"]
    return schema


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(WORDS, rng.randint(1, 3))
    properties = {name: _any(rng, depth - 1) for name in names}
    required = [name for name in names if rng.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _any(rng: random.Random, depth: int) -> dict[str, Any]:
    kind = rng.randrange(10)
    if depth > 0 and kind == 0:
        return _object(rng, depth)
    if depth > 0 and kind in (1, 2):
        low = rng.randint(0, 2)
        return {"type": "array", "items": _any(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if depth > 0 and kind == 3:
        return {"anyOf": [_any(rng, depth - 1) for _ in range(rng.randint(2, 3))]}
    return _leaf(rng)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-50, 50)
    length = rng.randint(0, 4)
    return [
        {"type": "string", "maxLength": rng.randint(1, 12)},
        {"type": "string", "minLength": length, "maxLength": length + 3},
        {"type": "string", "pattern": rng.choice(["^[a-c]{2,4}$", "^(yes|no)$", "^\\d{3}-\\d{2}$", "^[A-Z][a-z]*$"])},
        {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 3000)},
        {"type": "number", "minimum": low, "maximum": low + 1.5},
        {"type": ["boolean", "null"]},
        {"enum": rng.sample(["red", "grün", 7, 2.5, None, True, "a\nb"], rng.randint(1, 4))},
        {"const": rng.choice(["fixed", 3, {"a": [1]}])},
        {"type": "string", "format": rng.choice(["date", "uuid", "ipv4", "email"])},
    ][rng.randrange(LEAVES)]
