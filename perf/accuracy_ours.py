"""A child of perf/accuracy.py: what `trtbuild convert` does for one precision, then the reference executor's losses.

`python accuracy_ours.py JOB RESULT`, JSON files both. The workspace is fresh, so nothing that an earlier calibration
found is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from accuracy_measure import measured, read_job, versions, write_result
from transformers import AutoTokenizer  # noqa: F401  imports are not part of what is measured, and trtbuild's is late

from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.limits import EngineLimits
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.reference.executor import ReferenceExecutor
from trtbuild.workspace import Workspace


def recipe(method: str, model: str) -> Recipe:
    """Of `PRECISION` or `PRECISION,FIELD=VALUE,...`; the fields are the recipe's (budget, max_loss, calib_data)."""
    precision, *settings = method.split(",")
    return Recipe.create(model=model, precision=precision, name="measured", **dict(s.split("=", 1) for s in settings))


@torch.inference_mode()
def evaluate(executor: ReferenceExecutor, blocks: Iterable[list[int]]) -> list[float]:
    """Mean NLL in nats of each block's tokens after its first."""
    losses: list[float] = []
    for block in blocks:
        logits = executor.prefill(0, block[:-1], 0, "all")
        assert logits is not None
        losses.append(round(float(torch.nn.functional.cross_entropy(logits.float(), torch.tensor(block[1:]))), 5))
    return losses


def main() -> None:
    job = read_job()
    with tempfile.TemporaryDirectory() as directory:
        workspace = Workspace(Path(directory))

        def convert() -> RankCheckpoint:
            resolved = Job.resolve(recipe(job["method"], job["model"]), sources=workspace.sources)
            return convert_model(resolved, workspace, workers=job["threads"])

        checkpoint, figures = measured(convert)
        length = max(len(block) for blocks in job["texts"].values() for block in blocks)
        limits = EngineLimits(max_batch_size=1, max_seq_len=length, chunk_size=length)
        executor = ReferenceExecutor(checkpoint.plans, checkpoint.tensor, limits)
        nll = {name: evaluate(executor, blocks) for name, blocks in job["texts"].items()}
        size = sum(file.stat().st_size for file in checkpoint.directory.glob("rank*.safetensors"))
    write_result({**figures, "rank_bytes": size, "nll": nll, "versions": versions("trtbuild", "torch")})


if __name__ == "__main__":
    main()
