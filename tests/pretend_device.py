"""A device that is not there: on a CPU, tensors are told apart by where a GPU run would have put them.

`PretendDevice` names `cpu:0`, which torch computes on as on `cpu`. What is created on it, moved to it or computed from
what is there carries a mark. An operation on tensors of both places fails, as it does with a GPU; torch allows numbers
(no dimensions) and indices from the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cpu", 0)
_MARK = "_pretended"
# CPU indices of a GPU tensor are moved by torch itself.
_INDEXING = ("__getitem__", "__setitem__")
# It may copy from one device to another.
_COPYING = ("copy_",)


class Mixed(Exception):
    """Tensors of two devices in one operation."""


def is_on_device(tensor: torch.Tensor) -> bool:
    return getattr(tensor, _MARK, False)


class PretendDevice(TorchFunctionMode):
    """`num_operations` are those with tensors on the device."""

    num_operations = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        inputs = list(_tensors([args, kwargs]))
        marked = [is_on_device(tensor) for tensor in inputs]
        if name == "__get__":
            # `x.device` tells the pretended one; `x.T` and the like are views.
            result = func(*args, **kwargs)
            if isinstance(result, torch.device) and any(marked):
                return DEVICE
            return _mark(result, any(marked))
        target = _target(name, args, kwargs)
        if target is None and name not in (*_INDEXING, *_COPYING):
            places = {on for tensor, on in zip(inputs, marked, strict=True) if tensor.dim()}
            if len(places) > 1:
                raise Mixed(f"{name} of tensors on two devices: {[tuple(tensor.shape) for tensor in inputs]}")
        on_device = any(marked) if target is None else target == DEVICE
        self.num_operations += on_device
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and any(result is tensor for tensor in inputs):
            # In place, or a move that torch had no need to make: then it is another tensor with the same values.
            return result if target is None else _mark(result.view_as(result), on_device)
        return _mark(result, on_device)


def _target(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """The device that the operation names, None where it follows its inputs."""
    if name == "cpu":
        return torch.device("cpu")
    named = kwargs.get("device")
    if named is None and name == "to":
        named = next((arg for arg in args[1:] if isinstance(arg, torch.device | str)), None)
    return None if named is None else torch.device(named)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mark(result: Any, on_device: bool) -> Any:
    for tensor in _tensors(result):
        setattr(tensor, _MARK, on_device)
    return result
