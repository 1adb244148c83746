"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from trtbuild.checkpoints.precision import PRECISIONS

F = TypeVar("F", bound=Callable[..., Any])

workspace_option = click.option(
    "--workspace",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(),
    help="Where build/ and engines/ are.  [default: .]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def recipe_options(command: F) -> F:
    """The flags of a recipe; one that is not given keeps the recipe file's value, or the default."""
    options = [
        click.option("--name", help="NAME of the result.  [default: MODEL-PRECISION-tpN...]"),
        click.option("--revision", help="Hub revision (branch, tag or commit)."),
        click.option(
            "--precision",
            type=click.Choice(PRECISIONS),
            help="-asym: with zero points. auto mixes, within --budget or --max-loss.  "
            "[default: bf16, or the checkpoint's own]",
        ),
        click.option("--budget", metavar="SIZE", help="auto: bytes of weights on each GPU, e.g. 22GiB."),
        click.option("--max-loss", metavar="SHARE", help="auto: how much perplexity may grow, e.g. 0.5%."),
        click.option(
            "--kv-cache", type=click.Choice(["auto", "bf16", "fp16", "fp8"]), help="[default: auto, the 16-bit type]"
        ),
        click.option("--tp", type=int, metavar="N", help="Tensor-parallel ranks.  [default: 1]"),
        click.option("--pp", type=int, metavar="N", help="Pipeline stages.  [default: 1]"),
        click.option("--moe-tp", type=int, metavar="N", help="Ranks that cut each expert.  [default: tp / moe-ep]"),
        click.option("--moe-ep", type=int, metavar="N", help="Ranks that share out the experts.  [default: 1]"),
        click.option("--calib-data", type=click.Path(path_type=Path), help="Text to calibrate on.  [default: bundled]"),
        click.option(
            "--lora",
            multiple=True,
            metavar="DIR[=SCALE]",
            callback=lambda _, __, value: value or None,
            help="PEFT adapter to merge into the weights; repeatable.",
        ),
        click.option(
            "--builder",
            type=click.Choice(["tensorrt-rtx", "tensorrt-llm"]),
            help="tensorrt-llm: trtllm-build of 1.0 to 1.2, on a GPU.  [default: tensorrt-rtx]",
        ),
        click.option(
            "--trtllm",
            multiple=True,
            metavar="FLAG=VALUE",
            callback=lambda _, __, value: value or None,
            help="A flag of trtllm-build, e.g. tokens_per_block=64; repeatable.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def engine_options(command: F) -> F:
    options = [
        click.option("--target", help="Compute capabilities, e.g. sm89,sm120.  [default: all that can]"),
        click.option("--max-batch-size", type=int, metavar="N", help="[default: 8]"),
        click.option("--max-input-len", type=int, metavar="N", help="[default: max-seq-len - 1]"),
        click.option("--max-seq-len", type=int, metavar="N", help="[default: the model's, at most 4096]"),
        click.option("--chunk-size", type=int, metavar="N", help="Tokens of a prefill step.  [default: 512]"),
        click.option(
            "--segment-layers",
            type=int,
            metavar="N",
            help="Decoder layers in a plan.  [default: up to 8]",
        ),
        click.option(
            "--moe-form", type=click.Choice(["auto", "conditional", "routed", "dense"]), help="[default: auto]"
        ),
        click.option(
            "--embed-weights", is_flag=True, default=None, help="Put weights into the plans (int4 always does)."
        ),
        click.option("--plan-only", is_flag=True, default=None, help="Compile plans without weights."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


workers_option = click.option("--workers", type=click.IntRange(min=1), help="Parallel work.  [default: the cores]")


device_option = click.option(
    "--device",
    metavar="DEVICE",
    default="auto",
    show_default=True,
    help="Where calibrations compute: cpu, cuda or cuda:N; auto takes a GPU where torch has one.",
)


def pool_options(command: F) -> F:
    executor = click.option(
        "--executor",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Where the work is done: ray spreads it over a cluster that shares the workspace.",
    )
    address = click.option(
        "--ray-address",
        metavar="ADDRESS",
        help="Ray cluster; local starts one here.  [default: RAY_ADDRESS, or the one that runs here]",
    )
    return executor(address(command))


force_option = click.option("--force", is_flag=True, help="Replace what is there under this NAME.")


def sampling_options(command: F) -> F:
    """The flags of `engines.serving.request.SamplingParams`."""
    options = [
        click.option("--chat", is_flag=True, help="PROMPT is a user's message; apply the chat template."),
        click.option("--max-tokens", type=int, default=128, show_default=True),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, default=0, help="0 keeps all."),
        click.option("--top-p", type=float, default=1.0),
        click.option("--min-p", type=float, default=0.0),
        click.option("--repetition-penalty", type=float, default=1.0),
        click.option("--presence-penalty", type=float, default=0.0),
        click.option("--frequency-penalty", type=float, default=0.0),
        click.option("--seed", type=int),
        click.option("--stop", multiple=True, help="String that ends the answer; repeatable."),
        click.option(
            "--stop-token-id", "stop_token_ids", type=int, multiple=True, help="Token that ends the answer; repeatable."
        ),
        click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
        click.option(
            "--logprobs", type=int, metavar="N", help="Log-probabilities of the N likeliest tokens (with --json)."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _part(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    """2% or 0.02."""
    from trtbuild.accuracy.gate import parse_part

    try:
        return None if value is None else parse_part(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _new_file(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Found out before the work, not after it."""
    if value is not None and not value.absolute().parent.is_dir():
        raise click.BadParameter(f"{value.parent} is not a directory")
    return value


def verify_options(command: F) -> F:
    """The flags of `accuracy.verify.VerifyOptions.from_flags`, and where to put the page."""
    file = click.Path(dir_okay=False, path_type=Path)
    options = [
        click.option("--source", metavar="MODEL", help="Where the source checkpoint is now.  [default: where it was]"),
        click.option("--text", "texts", type=file, multiple=True, help="To compare on; repeatable.  [default: ours]"),
        click.option("--num-tokens", type=click.IntRange(min=64), help="Of each text, at most.  [default: 4096]"),
        click.option("--golden", type=file, help="Questions and what their answers must be, as JSON lines."),
        click.option("--max-ppl-increase", callback=_part, metavar="PART", help="2% or 0.02.  [default: by precision]"),
        click.option("--max-kl", type=click.FloatRange(min=0), help="Mean nats a token.  [default: by precision]"),
        click.option("--min-top1", callback=_part, metavar="PART", help="95% or 0.95.  [default: by precision]"),
        click.option(
            "--max-layer-error", type=click.FloatRange(min=0), help="Of every block.  [default: by its precision]"
        ),
        click.option("--html", type=file, callback=_new_file, help="Also write a page with everything."),
        click.option(
            "--executor", type=click.Choice(["auto", "reference", "tensorrt"]), default="auto", show_default=True,
            help="What answers for the engine.",
        ),
        click.option(
            "--device", metavar="DEVICE",
            help="Of the source and the reference executor: cpu, cuda or cuda:N.  [default: a GPU where torch has one]",
        ),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command
