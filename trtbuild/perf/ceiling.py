"""The roofline of `trtbuild plan` for measured points: how fast the GPU's data sheet lets an engine decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.engines.passport import Passport, verified_digest
from trtbuild.errors import TrtBuildError
from trtbuild.perf.records import Point
from trtbuild.planning.gpus import GPUS, Gpu
from trtbuild.planning.model_size import measure_rank
from trtbuild.planning.roofline import Roofline

# What NVML calls a product: all of these words, and the key in the table of GPUs; the first that fits counts.
_PRODUCTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("h100", "hbm3"), "h100-80"), (("h100", "sxm"), "h100-80"), (("h100", "pcie"), "h100-pcie"), (("h200",), "h200"),
    (("b200",), "b200"), (("a100", "sxm", "80gb"), "a100-80"), (("a100", "sxm", "40gb"), "a100-40"),
    (("rtx", "pro", "6000", "blackwell"), "rtx-pro-6000"), (("geforce", "rtx", "5090"), "rtx5090"),
    (("geforce", "rtx", "4090"), "rtx4090"), (("geforce", "rtx", "3090"), "rtx3090"), (("l40s",), "l40s"),
    (("l4",), "l4"), (("a10",), "a10"), (("t4",), "t4"), (("gb10",), "gb10"),
)  # fmt: skip
# Slower relatives whose names hold all the words of another product.
_OTHERS = frozenset({"nvl", "laptop", "ti", "max-q", "d", "gh200", "gb200", "mig"})


def gpu_of(name: str) -> Gpu | None:
    """The row of `plan`'s table for a product as NVML names it ("NVIDIA H100 80GB HBM3"); None where it has none."""
    words = set(name.lower().replace("-", " ").replace("sxm4", "sxm").replace("sxm5", "sxm").split())
    if words & _OTHERS:
        return None
    return next((GPUS[key] for wanted, key in _PRODUCTS if words.issuperset(wanted)), None)


class Ceilings:
    """Reads the passports in `engines`, a workspace's engines/; `notes` says why some points have no ceiling."""

    def __init__(self, engines: Path) -> None:
        self._engines = engines
        self.notes: dict[str, None] = {}
        self._roofline = lru_cache(maxsize=None)(self._make)

    def row(self, point: Point) -> dict[str, float]:
        """roofline_tokens_per_s of the whole server and roofline_user_tokens_per_s of one stream; {} where not known.

        Decode alone, with half of the answer behind it on average: prefill, launches and waiting are on top.
        """
        streams = point.spec.load.num_streams
        roofline = self._roofline(self._device(point), point.spec.engine, point.engine.get("digest"))
        if isinstance(roofline, str):
            self.notes[roofline] = None
            return {}
        if streams is None:
            self.notes["an open loop has no fixed number of streams, so its points have no ceiling"] = None
            return {}
        step = roofline.decode(streams, point.spec.isl + point.spec.osl // 2)
        return {
            "roofline_tokens_per_s": float(f"{step.tokens_per_second:.6g}"),
            "roofline_user_tokens_per_s": float(f"{1 / step.seconds:.6g}"),
        }

    @staticmethod
    def _device(point: Point) -> str:
        """A GPU's name, or why there is none, after "!"."""
        if point.device.startswith("unknown"):
            return "!measured on a server elsewhere, whose GPU is not known"
        gpus = point.environment.get("gpus") or []
        if point.device.startswith("cpu") or not gpus:
            return "!measured on a CPU, for which `trtbuild plan` has no roofline"
        names = {gpu["name"] for gpu in gpus}
        return names.pop() if len(names) == 1 else f"!different GPUs in one machine ({', '.join(sorted(names))})"

    def _make(self, device: str, engine: str, digest: str | None) -> Roofline | str:
        if device.startswith("!"):
            return device[1:]
        gpu = gpu_of(device)
        if gpu is None:
            return f"{device} is not in the table of `trtbuild plan`"
        try:
            passport = Passport.open(self._engines / engine)
        except TrtBuildError:
            return f"{engine} is not in this workspace, so its size is not known"
        if digest is not None and digest != verified_digest(passport.data):
            return f"{engine} was built again since it was measured"
        layout, config = passport.layout, passport.config
        ranks = list(layout.ranks())[:: layout.tp]
        stages = [measure_rank(plan_rank(config, rank, passport.precision)) for rank in ranks]
        return Roofline(config, layout, stages, gpu)


def add_ceilings(rows: Sequence[dict[str, Any]], points: Sequence[Point], ceilings: Ceilings) -> Mapping[str, None]:
    """Put `Ceilings.row` of each point into its row; returns the notes."""
    for row, point in zip(rows, points, strict=True):
        row.update(ceilings.row(point))
    return ceilings.notes
