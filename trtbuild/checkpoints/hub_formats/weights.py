"""Reading a quantized module's weight by rows: as it is stored, or dequantized.

AutoAWQ and GPTQ store matrices with the inputs first, so that a row of ours is a column of theirs. They are read in
bands of rows that are wide enough to take whole stretches of the file, and each thread keeps its last band.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import torch

from trtbuild.checkpoints.content import Digest, row_blocks
from trtbuild.checkpoints.hub_formats.modules import StoredModule
from trtbuild.checkpoints.hub_formats.unpack import AWQ_ORDER, NATURAL_ORDER, unpack_columns, unpack_pairs, unpack_rows
from trtbuild.checkpoints.precision import LinearForm
from trtbuild.checkpoints.quantization import QuantizedWeight, StoredWeight
from trtbuild.checkpoints.safetensors_file import MappedTensors
from trtbuild.errors import CheckpointError

# Values of a band: 4 MiB, and 1 KiB or more of each stored row of a matrix with 16384 inputs.
_BAND_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class _Band:
    """The rows of one module that a thread read last."""

    module: str
    rows: range
    weight: QuantizedWeight


class ModuleReader:
    """The quantized modules of a checkpoint, read through `mapped`; `dtype` is the model's 16-bit type.

    Every method raises CheckpointError for scales, zero points and indices that no tool writes.
    """

    def __init__(self, mapped: MappedTensors, dtype: torch.dtype) -> None:
        self._mapped = mapped
        self._dtype = dtype
        self._facts: dict[str, StoredWeight] = {}
        self._inverse: dict[str, torch.Tensor] = {}
        self._local = threading.local()

    def stored(self, module: StoredModule) -> StoredWeight:
        """What is known of a module before its values are read; looks at zero points and indices."""
        if module.name not in self._facts:
            self._facts[module.name] = self._read_facts(module)
        return self._facts[module.name]

    def stored_rows(self, module: StoredModule, start: int, stop: int) -> QuantizedWeight:
        """Rows start..stop as they are stored, the columns in the order of their groups."""
        scheme, order = module.scheme, self.stored(module).order
        if scheme.packing == "fp8":
            return self._fp8_rows(module, start, stop)
        if scheme.packing in ("awq", "gptq"):
            weight = self._band_rows(module, start, stop)
        else:
            weight = self._row_rows(module, start, stop)
        return weight if order is None else QuantizedWeight(weight.values[:, order], weight.scales, weight.zeros)

    def rows(self, module: StoredModule, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop dequantized, the columns in their own order, in the 16-bit type."""
        values = self.stored_rows(module, start, stop).dequantize()
        order = self.stored(module).order
        if order is not None:
            values = values[:, self._inverse.setdefault(module.name, torch.argsort(order))]
        return values.to(self._dtype)

    def tensor(self, module: StoredModule) -> torch.Tensor:
        """All rows dequantized, block by block."""
        whole = torch.empty(module.shape, dtype=self._dtype)
        for start, stop in row_blocks(module.shape):
            whole[start:stop] = self.rows(module, start, stop)
        return whole

    def digest(self, module: StoredModule) -> str:
        """Content digest of all of a module's tensors."""
        digest = Digest()
        for name in module.tensors:
            digest.update(name.encode())
            digest.update(self._mapped.tensor(name))
        return digest.hex()

    def _read_facts(self, module: StoredModule) -> StoredWeight:
        scheme, origin = module.scheme, module.scheme.origin
        if scheme.packing == "fp8":
            scale = self._one_scale(module, "input_scale") if "input_scale" in module.roles else None
            return StoredWeight(scheme.form(), origin, activation_scale=scale)
        self._check_shape(module)
        self._check_inputs(module)
        scales = self._mapped.entries[module.tensor("scales" if scheme.packing in ("awq", "gptq") else "weight_scale")]
        if scales.spec.dtype != {torch.float16: "F16", torch.bfloat16: "BF16"}[self._dtype] and scheme.bits == 4:
            # config.json's type is what the engine holds its scales in.
            origin += f", {scales.spec.dtype} scales rounded to {str(self._dtype).removeprefix('torch.')}"
        has_zeros = bool(self._zeros(module, 0, module.shape[0]).any())
        if has_zeros and scheme.bits == 8:
            raise CheckpointError(f"{module.name} has zero points with 8 bits, which cannot be represented")
        order = self._order(module)
        group = module.scheme.group_size if scheme.bits == 4 else None
        form = LinearForm("int4" if scheme.bits == 4 else "int8", group, zeros=has_zeros, order=order is not None)
        return StoredWeight(form, origin, order=order)

    def _band_rows(self, module: StoredModule, start: int, stop: int) -> QuantizedWeight:
        """Rows of a matrix that is stored by columns, out of the thread's band."""
        band: _Band | None = getattr(self._local, "band", None)
        if band is None or band.module != module.name or not (band.rows.start <= start and stop <= band.rows.stop):
            step = max(32, _BAND_ELEMENTS // module.shape[1] // 32 * 32)
            first = start // step * step
            last = min(module.shape[0], max(first + step, stop))
            band = _Band(module.name, range(first, last), self._column_rows(module, first, last))
            self._local.band = band
        part, whole = slice(start - band.rows.start, stop - band.rows.start), band.weight
        zeros = None if whole.zeros is None else whole.zeros[part]
        return QuantizedWeight(whole.values[part], whole.scales[part], zeros)

    def _column_rows(self, module: StoredModule, start: int, stop: int) -> QuantizedWeight:
        """Rows start..stop of AutoAWQ's and GPTQ's matrices; `start` is a multiple of 8."""
        scheme, stored = module.scheme, self._mapped.tensor(module.tensor("qweight"))
        if scheme.packing == "awq":
            values = unpack_columns(stored[:, start // 8 : -(-stop // 8)], 4, AWQ_ORDER)[: stop - start]
        else:
            values = unpack_rows(stored[:, start:stop].t(), scheme.bits)
        scales = self._mapped.tensor(module.tensor("scales"))[:, start:stop].t().contiguous()
        return self._checked(module, values, scales, start, stop)

    def _row_rows(self, module: StoredModule, start: int, stop: int) -> QuantizedWeight:
        """Rows start..stop of compressed-tensors' and ModelOpt's matrices, which are stored by rows."""
        if module.scheme.packing == "pairs":
            first = start // 2
            pairs = unpack_pairs(self._mapped.rows(module.tensor("weight"), first, -(-stop // 2)))
            values = pairs[start - 2 * first : stop - 2 * first]
        elif module.scheme.packing == "int8":
            values = self._mapped.rows(module.tensor("weight"), start, stop)
        else:
            values = unpack_rows(self._mapped.rows(module.tensor("weight_packed"), start, stop), module.scheme.bits)
        scales = self._mapped.rows(module.tensor("weight_scale"), start, stop)
        return self._checked(module, values, scales.reshape(stop - start, -1), start, stop)

    def _checked(
        self, module: StoredModule, values: torch.Tensor, scales: torch.Tensor, start: int, stop: int
    ) -> QuantizedWeight:
        _check_scales(module, scales)
        if module.scheme.bits == 8:
            return QuantizedWeight(values, scales[:, 0])
        has_zeros = self.stored(module).form.zeros
        return QuantizedWeight(values, scales, self._zeros(module, start, stop) if has_zeros else None)

    def _zeros(self, module: StoredModule, start: int, stop: int) -> torch.Tensor:
        """Zero points of rows start..stop in the values' range: int8 [rows, groups], or one 0 where none are stored."""
        scheme, bits = module.scheme, module.scheme.bits
        first, last = start * bits // 32, -(-stop * bits // 32)
        part = slice(start - first * 32 // bits, stop - first * 32 // bits)
        if scheme.packing not in ("awq", "gptq"):
            if "weight_zero_point" not in module.roles:
                return torch.zeros(1, dtype=torch.int8)
            # Packed along the outputs, unlike the weight.
            words = self._mapped.rows(module.tensor("weight_zero_point"), first, last)
            return unpack_columns(words.t(), bits)[part]
        words = self._mapped.tensor(module.tensor("qzeros"))[:, first:last]
        if scheme.zero_offset:
            words = _shift_zeros(module, words)
        return unpack_columns(words, bits, AWQ_ORDER if scheme.packing == "awq" else NATURAL_ORDER)[part]

    def _order(self, module: StoredModule) -> torch.Tensor | None:
        """The columns in the order of their groups, int64 [in]; None where that is their own order."""
        role = "g_idx" if module.scheme.packing == "gptq" else "weight_g_idx"
        if role not in module.roles:
            return None
        index = self._mapped.tensor(module.tensor(role)).long()
        size, groups = module.group_size, module.shape[1] // module.group_size
        if index.unique().tolist() == [-1]:
            # compressed-tensors' mark for "no order was found".
            return None
        if index.min() < 0 or index.max() >= groups or (torch.bincount(index, minlength=groups) != size).any():
            raise CheckpointError(
                f"{module.tensor(role)} does not put {size} of the {module.shape[1]} inputs into each of {groups} "
                "groups; the checkpoint is damaged"
            )
        order = torch.argsort(index, stable=True)
        return None if torch.equal(order, torch.arange(len(order))) else order

    def _fp8_rows(self, module: StoredModule, start: int, stop: int) -> QuantizedWeight:
        values = self._mapped.rows(module.tensor("weight"), start, stop)
        if (values.view(torch.uint8).bitwise_and(0x7F) == 0x7F).any():
            raise CheckpointError(f"{module.tensor('weight')} holds NaN; the checkpoint is damaged")
        if not module.scheme.rows:
            return QuantizedWeight(values, torch.tensor([self._one_scale(module, "weight_scale")]))
        scales = self._mapped.rows(module.tensor("weight_scale"), start, stop).flatten().float()
        _check_scales(module, scales)
        return QuantizedWeight(values, scales)

    def _one_scale(self, module: StoredModule, role: str) -> float:
        scale = self._mapped.tensor(module.tensor(role)).float().flatten()
        _check_scales(module, scale, role)
        return float(scale[0])

    def _check_inputs(self, module: StoredModule) -> None:
        """ModelOpt's factors of the inputs must have gone into what comes before, as TensorRT-LLM's reader allows."""
        if "pre_quant_scale" in module.roles and bool(
            (self._mapped.tensor(module.tensor("pre_quant_scale")) != 1).any()
        ):
            raise CheckpointError(
                f"{module.tensor('pre_quant_scale')} is not 1 everywhere: inputs that are scaled before they are "
                "multiplied cannot be represented; start from the 16-bit model"
            )

    def _check_shape(self, module: StoredModule) -> None:
        if "weight_shape" in module.roles:
            found = self._mapped.tensor(module.tensor("weight_shape")).tolist()
            if found != list(module.shape):
                raise CheckpointError(
                    f"{module.tensor('weight_shape')} is {found}, config.json implies {list(module.shape)}"
                )


def _check_scales(module: StoredModule, scales: torch.Tensor, role: str = "scales") -> None:
    low, high = (float(extreme) for extreme in scales.aminmax())
    # NaN spreads to both extremes, and compares as false.
    if not 0 < low <= high < float("inf"):
        found = "NaN" if math.isnan(low) else f"values from {low:g} to {high:g}"
        raise CheckpointError(
            f"{module.name}: its {role} hold {found}; scales are positive and finite. The checkpoint is damaged"
        )


def _shift_zeros(module: StoredModule, words: torch.Tensor) -> torch.Tensor:
    """Add GPTQ's 1 to every packed zero point.

    The largest one leaves the type. GPTQModel lets it borrow from its neighbour in the word, and takes that back by
    adding to whole words; the other tools disagree about it.
    """
    bits = module.scheme.bits
    ones = sum(1 << place for place in range(0, 32, bits))
    if not module.scheme.wraps and (unpack_rows(words, bits) == (1 << (bits - 1)) - 1).any():
        raise CheckpointError(
            f"{module.tensor('qzeros')}: zero points below 0, which GPTQ's first format cannot hold and its readers "
            "take for different numbers; quantize again with sym=True, or save as gptq_v2"
        )
    return words + ones
