"""Every test runs offline and draws the same examples each time."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# The models are tiny: threads only wait for each other, and for the other test workers.
torch.set_num_threads(1)

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")
