"""bf16 products in float32 pieces: the same as bf16's own, whatever the shapes, and only where they are for."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from trtbuild.engines.reference import products
from trtbuild.engines.reference.products import attention, product


@pytest.fixture(params=[True, False], ids=["float32", "bf16"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whichever way this processor prefers, in pieces that these small matrices need several of."""
    monkeypatch.setattr(products, "float32_is_faster", lambda: request.param)
    monkeypatch.setattr(products, "_COLUMNS", 24)
    monkeypatch.setattr(products, "_ROWS", 100)
    return request.param


@pytest.mark.parametrize("shape", [(300, 64), (3, 129, 64), (128, 64), (2, 64), (64,)], ids=str)
def test_a_product_is_the_exact_one_rounded_once(way: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).bfloat16(), torch.randn(70, 64).bfloat16()
    y, exact = product(x, weight), x.double() @ weight.double().T
    assert (y.dtype, y.shape) == (torch.bfloat16, exact.shape)
    # Half a unit in the last place of bf16's 8 bits, and what float32 sums leave.
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()


def test_attention_is_the_exact_one_within_bf16(way: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 140, 32).bfloat16() for heads in (4, 2, 2))
    mask = torch.ones(140, 140, dtype=torch.bool).tril()
    y = attention(q, k, v, mask, 0.2)
    exact = functional.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, scale=0.2, enable_gqa=True
    )
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() < 2e-2


def test_other_types_and_gradients_are_left_alone(way: bool) -> None:
    weight = torch.randn(70, 64)
    x = torch.randn(300, 64)
    assert torch.equal(product(x, weight), x @ weight.T)
    trained = x.bfloat16().requires_grad_()
    product(trained, weight.bfloat16()).sum().backward()
    assert trained.grad is not None


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, False),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "cpu_name": "AMD EPYC", "avx512_bf16": False}, True),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_which_processors_do(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], expected: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert products.float32_is_faster.__wrapped__() is expected
