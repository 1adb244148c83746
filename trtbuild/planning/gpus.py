"""GPUs that a plan is made for: memory, bandwidth and arithmetic of real products.

Arithmetic is dense (no structured sparsity) tensor-core throughput with float32 accumulation in 1e12 operations a
second; bandwidths are in 1e9 bytes a second, the link's in one direction, between two GPUs of one machine.
`memory` is what nvidia-smi shows in total, which is less than the product's name says where ECC takes its share.
`source` names the document that has a product's figures. They were entered without access to those documents: H100
SXM, H200, B200, A100, RTX 4090, T4 and A10 were compared with pages that quote them, the others were not, and for RTX
PRO 6000 and GB10 fp16 and fp8 follow from the sparse fp4 figure.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from trtbuild.engines.tensorrt.targets import MIN_SM, MIN_SM_MOE, TARGETS
from trtbuild.errors import Refused

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """One product; `fp8` and `fp4` are None where its tensor cores have no such type; `tdp` is in watts."""

    name: str
    title: str
    sm: int
    memory: int
    bandwidth: float
    fp16: float
    int8: float
    fp8: float | None
    fp4: float | None
    link: str
    link_bandwidth: float
    tdp: int
    source: str

    @property
    def target(self) -> str:
        return f"sm{self.sm}"

    @property
    def has_rtx_engines(self) -> bool:
        """Whether TensorRT-RTX compiles for it; others need TensorRT or TensorRT-LLM, built on such a GPU."""
        return self.target in TARGETS

    def missing(self, formats: Collection[str], moe: bool) -> list[str]:
        """What its tensor cores lack for these types; a router is a float32 matrix multiply."""
        lacking = [f"no {name} (needs sm{MIN_SM[name]})" for name in sorted(formats) if self.sm < MIN_SM[name]]
        return lacking + ([f"no float32 matrix multiply for a router (needs sm{MIN_SM_MOE})"] * (moe and self.sm < 80))


_PCIE3, _PCIE4, _PCIE5 = ("PCIe 3.0 x16", 16.0), ("PCIe 4.0 x16", 32.0), ("PCIe 5.0 x16", 64.0)
_ADA = "NVIDIA Ada GPU Architecture white paper 2.01, appendix"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture white paper 1.1, appendix"

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("t4", "T4", 75, 15360 * MIB, 320, 65, 130, None, None, *_PCIE3, 70, "NVIDIA T4 data sheet, 2019"),
        Gpu("a10", "A10", 86, 23028 * MIB, 600, 125, 250, None, None, *_PCIE4, 150, "NVIDIA A10 data sheet, 2021"),
        Gpu(
            "rtx3090", "RTX 3090", 86, 24576 * MIB, 936, 71, 284, None, None, *_PCIE4, 350,
            "NVIDIA Ampere GA102 white paper 2.1, appendix",
        ),
        Gpu(
            "a100-40", "A100 40GB SXM", 80, 40960 * MIB, 1555, 312, 624, None, None, "NVLink 3", 300, 400,
            "NVIDIA A100 data sheet, 2021",
        ),
        Gpu(
            "a100-80", "A100 80GB SXM", 80, 81920 * MIB, 2039, 312, 624, None, None, "NVLink 3", 300, 400,
            "NVIDIA A100 data sheet, 2021",
        ),
        Gpu("l4", "L4", 89, 23034 * MIB, 300, 121, 242, 242, None, *_PCIE4, 72, "NVIDIA L4 data sheet, 2023 (halved)"),
        Gpu("rtx4090", "RTX 4090", 89, 24564 * MIB, 1008, 165.2, 660.6, 330.3, None, *_PCIE4, 450, _ADA),
        Gpu("l40s", "L40S", 89, 46068 * MIB, 864, 362, 733, 733, None, *_PCIE4, 350, "NVIDIA L40S data sheet, 2023"),
        Gpu(
            "h100-80", "H100 80GB SXM", 90, 81559 * MIB, 3350, 989.4, 1978.9, 1978.9, None, "NVLink 4", 450, 700,
            "NVIDIA H100 data sheet, 2023 (halved)",
        ),
        Gpu(
            "h100-pcie", "H100 80GB PCIe", 90, 81559 * MIB, 2000, 756, 1513, 1513, None, *_PCIE5, 350,
            "NVIDIA H100 Hopper architecture white paper 1.04",
        ),
        Gpu(
            "h200", "H200 141GB SXM", 90, 143771 * MIB, 4800, 989.4, 1978.9, 1978.9, None, "NVLink 4", 450, 700,
            "NVIDIA H200 data sheet, 2024 (halved)",
        ),
        Gpu(
            "b200", "B200 180GB HGX", 100, 183359 * MIB, 8000, 2250, 4500, 4500, 9000, "NVLink 5", 900, 1000,
            "NVIDIA Blackwell architecture technical brief, 2024",
        ),
        Gpu("rtx5090", "RTX 5090", 120, 32607 * MIB, 1792, 209.5, 838, 419, 1676, *_PCIE5, 575, _BLACKWELL),
        Gpu(
            "rtx-pro-6000", "RTX PRO 6000 Blackwell", 120, 97887 * MIB, 1792, 503.8, 1007.6, 1007.6, 2015, *_PCIE5, 600,
            "NVIDIA RTX PRO 6000 Blackwell white paper, 2025 (4,000 sparse fp4 TOPS, halved for each step)",
        ),
        # Memory is shared with the CPU; the arithmetic follows from 1 PFLOP of sparse fp4 by halves.
        Gpu(
            "gb10", "GB10 (DGX Spark)", 121, 119 * 1024 * MIB, 273, 125, 250, 250, 500, "ConnectX-7 200 GbE", 25, 140,
            "NVIDIA DGX Spark data sheet, 2025 (derived from its fp4 figure)",
        ),
    )
}  # fmt: skip


def gpu_named(name: str) -> Gpu:
    """Raises `Refused`, listing the known names; case, spaces and hyphens do not matter ("RTX 4090")."""
    wanted = _plain(name)
    for gpu in GPUS.values():
        if wanted in (_plain(gpu.name), _plain(gpu.title)):
            return gpu
    raise Refused(f"--gpu {name}: not in the table of GPUs; known: {', '.join(GPUS)}")


def _plain(name: str) -> str:
    return "".join(char for char in name.lower() if char.isalnum())
