"""The tables of `trtbuild plan`, readable at 100 columns."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from trtbuild.planning.device_fit import PIPELINE_ONLY, gib
from trtbuild.planning.host import Range
from trtbuild.planning.model_size import KINDS
from trtbuild.planning.plan import EnginePlan, Recommendation
from trtbuild.planning.recommend import COMPARED_BATCH
from trtbuild.planning.roofline import BATCHES, Step

if TYPE_CHECKING:
    from rich.table import Table

_WIDTH = 100


def print_plan(plan: EnginePlan, as_json: bool) -> None:
    """Everything on stdout."""
    if as_json:
        click.echo(json.dumps(plan.to_dict(), indent=1))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(_heading(plan))
        for table in _tables(plan):
            # Beside the table, not in it, where they would be wrapped to its width.
            title, caption, table.title, table.caption = table.title, table.caption, None, None
            console.print(f"\n[bold]{title}[/bold]", table, *([caption] if caption else []), sep="\n")
    text = "\n".join(line.rstrip() for line in capture.get().splitlines())
    click.echo(re.sub(r"\n{3,}", "\n\n", text).rstrip())


def _tables(plan: EnginePlan) -> Iterator[Table]:
    yield _rank_table(plan)
    yield _fit_table(plan)
    if any(device.fit.fits for device in plan.devices):
        yield _roofline_table(plan)
    yield _host_table(plan)
    if plan.recommendations:
        yield _recommendation_table(plan)


def _heading(plan: EnginePlan) -> str:
    job, parameters = plan.job, plan.parameters
    layout, limits = job.layout, job.limits
    origin = "built-in facts of this model, not the checkpoint" if job.source.has_built_in_config else "config.json"
    active = f", {parameters.active / 1e9:.2f} B active per token" if parameters.active != parameters.total else ""
    kept = f", the rest {job.precision.dtype}" if job.precision.is_quantized else ""
    lines = [
        f"[bold]{job.recipe.engine_name}[/bold]  {job.source.model} ({job.config.architecture})",
        f"  config      {origin}",
        f"  parameters  {parameters.total / 1e9:.2f} B{active}",
        f"  precision   {job.precision.weights}{kept}",
        f"  layout      tp {layout.tp}, pp {layout.pp}, moe-tp {layout.moe_tp}, moe-ep {layout.moe_ep}",
        f"  attention   {plan.attention}",
        f"  limits      {limits.max_batch_size} slots of {limits.max_seq_len} tokens"
        + ("" if plan.is_trtllm else f", chunks of {limits.chunk_size}"),
    ]
    return "\n".join(lines)


def _rank_table(plan: EnginePlan) -> Table:
    # Ranks with the same bytes share a column.
    columns: dict[tuple[int, ...], list[int]] = {}
    for number, rank in enumerate(plan.ranks):
        sizes = (*(rank.kinds[kind] for kind in KINDS), rank.weight_bytes, rank.cache_bytes)
        columns.setdefault(sizes, []).append(number)
    heads = [f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}" for ranks in columns.values()]
    table = _table("Bytes per rank", "", *heads)
    for kind, *row in zip(KINDS, *columns, strict=False):
        if any(row):
            table.add_row(kind, *map(_size, row))
    table.add_section()
    table.add_row("all", *(_size(sizes[-2]) for sizes in columns))
    table.add_row("KV cache of a token", *(f"{sizes[-1]:,} B" for sizes in columns))
    return table


def _fit_table(plan: EnginePlan) -> Table:
    world = plan.job.layout.world_size
    why = "what TensorRT-LLM takes is not known" if plan.is_trtllm else "for tensorrt-rtx is not installed"
    scratch = f"not forecast, {why}" if plan.scratch is None else _size(plan.scratch)
    title = f"Does it fit on {world} of them? (scratch on each: {scratch})"
    table = _table(title, "GPU", "usable", "KV tokens", "sequences", left="why not")
    for device in plan.devices:
        fit = device.fit
        held = (f"{fit.tokens:,}", f"{fit.sequences:,}") if fit.fits else ("-", "-")
        title = fit.gpu.title + (" +" if fit.notes else "")
        table.add_row(title, gib(fit.usable_bytes), *held, "; ".join(fit.limits), style=None if fit.fits else "dim")
    notes = [
        "no target of TensorRT-RTX: needs the builder tensorrt or tensorrt-llm, on such a GPU"
        if any(not device.fit.gpu.has_rtx_engines for device in plan.devices) and not plan.is_trtllm
        else "",
        PIPELINE_ONLY if plan.job.layout.pp > 1 and not plan.is_trtllm else "",
    ]
    if any(notes):
        table.caption = "+ " + "; ".join(note for note in notes if note)
    return table


def _roofline_table(plan: EnginePlan) -> Table:
    fitting = [device for device in plan.devices if device.fit.fits]
    batches = [batch for batch in BATCHES if any(batch in device.decode for device in fitting)]
    title = f"Roofline, not a measurement: tokens/s at most, {plan.context} positions behind each sequence"
    table = _table(title, "GPU", "prefill", *(f"decode {batch}" for batch in batches))
    for device in fitting:
        steps = (device.prefill, *(device.decode.get(batch) for batch in batches))
        table.add_row(device.fit.gpu.title, *map(_speed, steps))
    chunk = plan.job.limits.chunk_size
    table.caption = f"prefill in chunks of {chunk}, decode by batch; bound by m memory bandwidth, c arithmetic, l link"
    return table


def _speed(step: Step | None) -> str:
    return f"{step.tokens_per_second:,.0f} {step.bound[0]}" if step else "-"


def _host_table(plan: EnginePlan) -> Table:
    host, is_moe = plan.host, plan.job.config.moe is not None
    table = _table("Making it on this machine (estimates)", "stage", "memory", "time", left="rests on")
    reasons = {
        "convert": "measured bytes/s of one worker",
        "calibrate": "measured operations/s of one core" + ("; every expert sees every token" * is_moe),
        "compile": f"measured seconds of a layer and of an expert; {host.num_plans} plans",
    }
    for stage in ("convert", "calibrate", "compile"):
        if stage in host.memory:
            table.add_row(stage, _span(host.memory[stage], _size), _span(host.seconds[stage], _time), reasons[stage])
    table.caption = "disk: " + ", ".join(f"{name} {_size(size)}" for name, size in host.disk.items())
    return table


def _recommendation_table(plan: EnginePlan) -> Table:
    table = _table(
        "What runs on which machine", "machine", "options of compile", "sequences", "decode/s", left="why not"
    )
    table.columns[1].justify = "left"
    table.columns[1].no_wrap = True
    for recommendation in plan.recommendations:
        for row in _recommendation_rows(recommendation):
            table.add_row(*row)
        table.add_section()
    batch = plan.job.limits.max_batch_size
    table.caption = (
        f"* recommended: the highest precision that holds {batch} sequences, or the most of them; "
        f"decode: roofline, at most {COMPARED_BATCH} at once"
    )
    return table


def _recommendation_rows(recommendation: Recommendation) -> Iterator[tuple[str, ...]]:
    mark = "" if recommendation.gpu.has_rtx_engines else " +"
    machine = f"{recommendation.num_gpus} x {recommendation.gpu.title}{mark}"
    if recommendation.choice is None:
        nearest = recommendation.options[-1]
        yield machine, "  none of them", "-", "-", f"{nearest.flags}: {'; '.join(nearest.limits)}"
        return
    for option in recommendation.options:
        mark = "* " if option is recommendation.choice else "  "
        held = f"{option.fit.sequences:,}" if option.fit and option.fits else "-"
        speed = f"{option.decode.tokens_per_second:,.0f}" if option.decode else "-"
        yield machine, mark + option.flags.replace("--precision ", ""), held, speed, "; ".join(option.limits)
        machine = ""


def _table(title: str, first: str, *numbers: str, left: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    if left:
        table.add_column(left)
    return table


def _span(span: Range, show: Callable[[float], str]) -> str:
    low, high = show(span.low), show(span.high)
    return low if low == high else f"{low} to {high}"


def _size(size: float) -> str:
    return gib(size) if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
