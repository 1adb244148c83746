"""AWQ's scales: input channels that carry much are made larger in the weights, and smaller where they come from.

W x = (W diag(s)) (x / s). Rounding W diag(s) loses less where |x| is large (arXiv 2306.00978). The division by s is
folded into whatever makes x, so that the network stays as it is: a norm's weights, or the rows of the layer before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.engines.calibration.int4_grid import GridForm, round_to_grid, widest_grid

# How much of a scale comes from the inputs; the rest is the weights'.
EXPONENTS = tuple(i / 20 for i in range(21))
# Rows that a trial looks at: of one matrix, of all that share an input, and of each where these are many (experts).
_SAMPLED_ROWS, _ROWS_IN_ALL, _FEWEST_ROWS = 512, 2048, 32


@dataclass(frozen=True)
class NormFold:
    """The layers that read one norm's output; `scaled_plain` are unquantized ones, whose weights take s as well."""

    norm: str
    linears: tuple[str, ...]
    scaled_plain: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowFold:
    """A layer whose input is made by another one's rows: column c of `linear` comes from row `first + c` of `producer`.

    `repeats` columns of `heads` heads in turn share a row (grouped queries): s must be the same for them.
    """

    producer: str
    linear: str
    first: int
    heads: int = 1
    repeats: int = 1


def folds(config: ModelConfig, layer: int) -> tuple[list[NormFold], list[RowFold]]:
    """Where the scales of one decoder layer go; names as in the rank plan, without `transformer.layers.N.`.

    MLA's output projection has none: what makes its input stays in 16 bit and is shared with the keys.
    """
    norms, rows = [], []
    if config.mla:
        query = () if config.mla.q_lora_rank else ("attention.q_b_proj",)
        norms.append(NormFold("input_layernorm", ("attention.fused_a", *query)))
        if config.mla.q_lora_rank:
            norms.append(NormFold("attention.q_a_layernorm", ("attention.q_b_proj",)))
    else:
        norms.append(NormFold("input_layernorm", ("attention.qkv",)))
        first = (config.num_heads + config.num_kv_heads) * config.head_dim
        repeats = config.num_heads // config.num_kv_heads
        rows.append(RowFold("attention.qkv", "attention.dense", first, config.num_kv_heads, repeats))
    moe = config.moe if config.is_moe(layer) else None
    if moe is None:
        norms.append(NormFold("post_layernorm", ("mlp.fc", "mlp.gate")))
        rows.append(RowFold("mlp.gate", "mlp.proj", 0))
        return norms, rows
    shared = ("mlp.shared_expert.fc",) if moe.shared_intermediate_size else ()
    gate = ("mlp.shared_expert_gate.weight",) if moe.shared_gate else ()
    norms.append(NormFold("post_layernorm", ("mlp.fc", *shared), ("mlp.router.weight", *gate)))
    rows.append(RowFold("mlp.fc", "mlp.proj", 0))
    rows += [RowFold("mlp.shared_expert.fc", "mlp.shared_expert.proj", 0) for _ in shared]
    return norms, rows


def share_between_heads(values: torch.Tensor, fold: RowFold) -> torch.Tensor:
    """The mean over the columns that come from one row, for each such column: [in] -> [in]."""
    if fold.repeats == 1:
        return values
    by_row = values.unflatten(0, (fold.heads, fold.repeats, -1))
    return by_row.mean(1, keepdim=True).expand_as(by_row).flatten()


def search(
    readers: Sequence[torch.Tensor],
    magnitude: torch.Tensor,
    tokens: torch.Tensor,
    form: GridForm,
    fold: RowFold | None = None,
) -> torch.Tensor:
    """One scale s [in] for all `readers` of an input (each [out, in]): x / s is the mean of what each alone would take.

    The error of all together would be that of those with the largest outputs: queries and keys, whose errors matter
    less than those of the values. `magnitude` [in] is the mean of |x|, `tokens` [n, in] a sample. With `fold` the
    columns that come from one row get the same s.
    """
    rows = max(_FEWEST_ROWS, min(_SAMPLED_ROWS, _ROWS_IN_ALL // len(readers)))
    tokens = tokens.float().T
    divided = torch.zeros_like(magnitude)
    for weight in readers:
        divided += 1 / _best_scale(weight, magnitude, tokens, form, fold, rows)
    return len(readers) / divided


def _best_scale(
    weight: torch.Tensor,
    magnitude: torch.Tensor,
    tokens: torch.Tensor,
    form: GridForm,
    fold: RowFold | None,
    num_rows: int,
) -> torch.Tensor:
    """Of s = |x|^a / |w|^(1-a), and of 1, what rounds some rows of one matrix with the least error; tokens [in, n].

    |w| is the mean over the rows, each value as a share of its group's largest.
    """
    shares = torch.cat([_shares(part, form.group) for part in weight.split(_ROWS_IN_ALL)]).mean(0)
    if fold:
        magnitude, shares = share_between_heads(magnitude, fold), share_between_heads(shares, fold)
    rows = weight[:: max(1, len(weight) // num_rows)].float()
    base = magnitude.clamp(min=float(magnitude.mean()) * 1e-4 + 1e-12)
    shares = shares.clamp(min=1e-5)
    best, chosen = torch.inf, torch.ones_like(magnitude)
    for exponent in (None, *EXPONENTS):
        scale = torch.ones_like(base) if exponent is None else base**exponent / shares ** (1 - exponent)
        scale = scale / (scale.max() * scale.min()).sqrt()
        scaled = rows * scale
        error = (round_to_grid(scaled, widest_grid(scaled, form)).dequantize() / scale).sub_(rows)
        loss = float((error @ tokens).square().sum())
        if loss < best:
            best, chosen = loss, scale
    return chosen


def _shares(rows: torch.Tensor, group: int) -> torch.Tensor:
    groups = rows.float().unflatten(1, (-1, group)).abs()
    return (groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).flatten(1)
