"""Where a calibration computes: `--device`, and the record of what computed a kept result.

The device is no part of what identifies a result: one that a GPU made serves a machine without one, and the other way.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from trtbuild.errors import Refused
from trtbuild.workspace import read_json, write_json

RECORD = "record.json"


def compute_device(name: str = "auto") -> torch.device:
    """`auto` (a GPU where torch has one: minutes in place of hours for a large model), `cpu`, `cuda` or `cuda:N`.

    Raises Refused where the name is none of these, or torch has no such GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", name):
        raise Refused(f"--device {name}: allowed are auto, cpu, cuda and cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU"
            raise Refused(f"--device {name}: {why}; use --device cpu, or leave it out")
        count = torch.cuda.device_count()
        if device.index is not None and device.index >= count:
            raise Refused(
                f"--device {name}: torch sees {count} CUDA GPU{'s' * (count > 1)}, cuda:0 to cuda:{count - 1}"
            )
    return device


def note_device(directory: Path, device: torch.device) -> None:
    """Add to the record of a calibration that `device` computes (a part of) it; call it before work starts."""
    entry = {"device": device.type, "name": _model(device), "torch": torch.__version__}
    found = devices_of(directory)
    if entry not in found:
        write_json(directory / RECORD, {"devices": [*found, entry]})


def devices_of(directory: Path) -> list[dict[str, Any]]:
    """What computed the calibration in `directory`: type, model and torch's version; empty where it is not known."""
    file = directory / RECORD
    return read_json(file)["devices"] if file.is_file() else []


def _model(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None
