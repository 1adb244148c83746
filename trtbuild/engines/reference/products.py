"""Products of 16-bit matrices on a CPU whose own bf16 products are slower than float32's.

oneDNN multiplies bf16 with AMX, or with avx512_bf16's dot product. On Intel's server cores the latter reaches 84
GFLOPS a core where float32 reaches 127 to 160 (torch 2.13, Sapphire Rapids with AMX masked by its hypervisor); AMD's do
twice as many bf16 operations as float32 ones. Both ways sum in float32 and round once; attention's weights are not
rounded between its two products.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

# Fewer rows are not worth converting the weights for; measured: from about 64 on.
_MIN_ROWS = 128
# What is converted at a time: columns of the product (and elements of weights, 32 MiB), and rows of x.
_COLUMNS = 2048
_PIECE = 1 << 23
_ROWS = 512


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [..., in] times weight [out, in] transposed: [..., out] in x's type."""
    rows = x.numel() // max(1, x.shape[-1])
    if not _takes_float32(x, rows):
        return x @ weight.transpose(-1, -2)
    return _in_float32(x.reshape(rows, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))


def attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Of query [1, heads, n, D] over keys [1, KV heads, m, D] and values [1, KV heads, m, any], in the query's type."""
    parts = query, keys, values
    if _takes_float32(query, query.shape[2]):
        parts = query.float(), keys.float(), values.float()
    y = functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.to(query.dtype)


def _takes_float32(x: torch.Tensor, rows: int) -> bool:
    if rows < _MIN_ROWS or x.dtype != torch.bfloat16 or x.device.type != "cpu" or not float32_is_faster():
        return False
    return not (torch.is_grad_enabled() and x.requires_grad)


@functools.cache
def float32_is_faster() -> bool:
    """Whether this processor is an x86 one without AMX, and either Intel's or without avx512_bf16."""
    # Since torch 2.11 or so; an older one keeps to bf16.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64" or capabilities.get("amx_bf16"):
        return False
    return "Intel" in str(capabilities.get("cpu_name")) or not capabilities.get("avx512_bf16")


def _in_float32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, in] and weight [out, in]; never a float32 copy of the whole weight, which may be a vocabulary's."""
    y = x.new_empty(len(x), len(weight))
    columns = max(1, min(_COLUMNS, _PIECE // x.shape[-1]))
    for out, part in zip(y.split(columns, dim=1), weight.split(columns), strict=True):
        transposed = part.float().T
        for rows, block in zip(out.split(_ROWS), x.split(_ROWS), strict=True):
            rows.copy_(block.float() @ transposed)
    return y
