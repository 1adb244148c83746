"""How much of a difference between two int4 models is chance: `python perf/rounding.py [DIR] [--seeds N] [--save]`.

The linear layers are rounded to int4 in groups of 128, each group's scale amax / 7 times a random number within 1 %:
as many roundings as seeds, none better than another. Their perplexities on the texts of `perf/accuracy.py` differ all
the same, and by what its standard errors, over blocks of text, cannot see. Computed by transformers in float32.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accuracy import CHECKPOINTS, Inputs, machine, save
from accuracy_measure import versions
from transformers import AutoModelForCausalLM

RESULTS = Path(__file__).parent / "results" / "rounding.jsonl"
GROUP = 128
JITTER = 0.01
BLOCKS_AT_ONCE = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=CHECKPOINTS / "tiny-mixtral", metavar="DIR")
    parser.add_argument("--model-name", metavar="NAME", help="In the saved line.  [default: DIR's last part]")
    parser.add_argument("--blocks", type=int, default=32, help="Of 256 tokens, from each text.  [default: 32]")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    inputs = Inputs.prepare(options.model.resolve(), options.blocks)
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32).eval()
    weights = {
        name: layer.weight.detach().bfloat16()
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name
    }
    found: dict[str, list[float]] = {name: [] for name in inputs.texts}
    for seed in range(options.seeds):
        generator = torch.Generator().manual_seed(seed)
        for name, weight in weights.items():
            model.get_submodule(name).weight.data.copy_(rounded(weight, generator))
        for name, blocks in inputs.texts.items():
            found[name].append(round(mean_nll(model, blocks), 5))
        print(seed, {name: values[-1] for name, values in found.items()}, flush=True)
    for name, values in found.items():
        spread = round(statistics.stdev(values), 5)
        print(f"{name}: standard deviation over roundings {spread} nats a token")
        if options.save:
            line = {
                "date": time.strftime("%Y-%m-%d"), "model": options.model_name or inputs.model.name,
                "inputs": inputs.identity, "text": name, "nll": values, "stdev": spread,
                "versions": versions("torch", "transformers"), "machine": machine(),
            }  # fmt: skip
            save(RESULTS, line)


def rounded(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`weight` [out, in] as int4 holds it, in float32."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 7
    jitter = 1 + JITTER * (2 * torch.rand(scales.shape, generator=generator) - 1)
    scales = (scales * jitter).bfloat16().float().clamp(min=1e-30)
    return ((groups / scales).round().clamp(-8, 7) * scales).flatten(1)


@torch.inference_mode()
def mean_nll(model: Any, blocks: list[list[int]]) -> float:
    """In nats, of each block's tokens after its first."""
    total = 0.0
    for batch in torch.tensor(blocks).split(BLOCKS_AT_ONCE):
        hidden = model.model(batch[:, :-1], use_cache=False).last_hidden_state
        for states, block in zip(hidden, batch, strict=True):
            total += float(torch.nn.functional.cross_entropy(model.lm_head(states), block[1:]))
    return total / len(blocks)


if __name__ == "__main__":
    main()
