"""The JSON schema that makes a model call a tool: for `tool_choice` "required" or a named function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from trtbuild.triton_repo.openai.errors import refused
from trtbuild.triton_repo.openai.schemas import NamedToolChoice, Tool

_DEFINITIONS = ("$defs", "definitions")


def forced_guide(
    tools: Sequence[Tool], choice: Literal["none", "auto", "required"] | NamedToolChoice, parallel: bool
) -> dict[str, Any] | None:
    """Schema of {"name", "arguments"} (a non-empty list of them for "required"); None where the model is free."""
    if isinstance(choice, str):
        if choice != "required":
            return None
        chosen = list(tools)
    else:
        chosen = [tool for tool in tools if tool.function.name == choice.function.name]
        if not chosen:
            raise refused(f"tool_choice names {choice.function.name!r}, which is not among tools", "tool_choice")
    definitions: dict[str, Any] = {}
    calls = [_call_schema(tool, index, definitions) for index, tool in enumerate(chosen)]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if isinstance(choice, str) and parallel:
        schema = {"type": "array", "minItems": 1, "items": schema}
    return schema | ({"$defs": definitions} if definitions else {})


def _call_schema(tool: Tool, index: int, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters = tool.function.parameters or {"type": "object", "properties": {}}
    if parameters.get("type", "object") != "object":
        raise refused(
            f"the parameters of tool {tool.function.name!r} must be a schema of an object",
            f"tools[{index}].function.parameters",
        )
    prefix = f"{index}."
    inner = {key: value for key, value in parameters.items() if key not in _DEFINITIONS}
    for key in _DEFINITIONS:
        for name, definition in _definitions(parameters, key, tool).items():
            definitions[prefix + name] = _moved(definition, prefix, tool)
    return {
        "type": "object",
        "properties": {
            "name": {"const": tool.function.name},
            "arguments": {"type": "object"} | _moved(inner, prefix, tool),
        },
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _definitions(parameters: dict[str, Any], key: str, tool: Tool) -> dict[str, Any]:
    found = parameters.get(key, {})
    if not isinstance(found, dict):
        raise refused(f"{key} of tool {tool.function.name!r} must be an object", "tools")
    return found


def _moved(schema: Any, prefix: str, tool: Tool, depth: int = 0) -> Any:
    """The schema with its references following its definitions to the top of the guide."""
    if depth > 100:
        raise refused(f"the parameters of tool {tool.function.name!r} are nested too deeply", "tools")
    if isinstance(schema, list):
        return [_moved(one, prefix, tool, depth + 1) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _moved_value(key, value, prefix, tool, depth + 1) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str):
        head, _, name = reference.rpartition("/")
        if head not in {f"#/{key}" for key in _DEFINITIONS}:
            raise refused(
                f"tool {tool.function.name!r}: $ref {reference!r} must point into $defs of the parameters", "tools"
            )
        result["$ref"] = f"#/$defs/{prefix}{name}"
    return result


def _moved_value(key: str, value: Any, prefix: str, tool: Tool, depth: int) -> Any:
    if key in {"const", "enum", "default", "examples"}:
        return value
    if key in {"properties", "patternProperties", "dependentSchemas"} and isinstance(value, dict):
        # Here the keys are names, whatever they read like.
        return {name: _moved(one, prefix, tool, depth) for name, one in value.items()}
    return _moved(value, prefix, tool, depth)
