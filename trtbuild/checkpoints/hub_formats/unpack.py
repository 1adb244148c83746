"""Codes out of int32 words: 4 or 8 bits each, unsigned, the lowest bits first.

Written down from the tools' packing: AutoAWQ awq/modules/linear/gemm.py, AutoGPTQ qlinear_cuda.py, compressed-tensors
compressors/pack_quantized/helpers.py. An unsigned 4-bit code is 8 more than the value (an 8-bit one 128 more).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Which of a word's eight columns the nibbles hold.
NATURAL_ORDER = tuple(range(8))
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n], packed along the columns, -> int8 values [rows, n * 32 / bits]."""
    octets = words.contiguous().view(torch.uint8)
    if bits == 8:
        return (octets ^ 0x80).view(torch.int8)
    # Each octet becomes two, the lower nibble in the first: b and b << 4 have both of them in the right place.
    pairs = octets.to(torch.int16)
    pairs.bitwise_or_(pairs << 4).bitwise_and_(0x0F0F)
    return pairs.view(torch.int8).sub_(8)


def unpack_columns(words: torch.Tensor, bits: int, order: Sequence[int] = NATURAL_ORDER) -> torch.Tensor:
    """int32 [k, n], packed along the columns, -> the transposed int8 values [n * 32 / bits, k].

    `order` gives, for 4 bits, the column of each nibble within its word.
    """
    words = words.t().contiguous()
    per_word, mask, middle = 32 // bits, (1 << bits) - 1, 1 << (bits - 1)
    values = torch.empty((len(words), per_word, words.shape[1]), dtype=torch.int8)
    part = torch.empty_like(words)
    for place in range(per_word):
        torch.bitwise_right_shift(words, place * bits, out=part)
        row = order[place] if bits == 4 else place
        values[:, row].copy_(part.bitwise_and_(mask).sub_(middle))
    return values.flatten(0, 1)


def unpack_pairs(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [rows / 2, in], the even row in the low nibble, signed -> int8 values [rows, in] (ModelOpt's int4)."""
    nibbles = torch.stack((packed << 4, packed & 0xF0), dim=1).view(torch.int8)
    # The sign is shifted down with them.
    return (nibbles >> 4).flatten(0, 1)
