"""What commands print when they are done: results on stdout, as a table or as JSON."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
    from trtbuild.engines.compile import CompileReport
    from trtbuild.planning.watched_compile import MemoryReport


def print_conversion(checkpoint: RankCheckpoint, as_json: bool) -> None:
    """The rank checkpoint: where, how big, and which precision how many layers got."""
    sizes = [file.stat().st_size for file in sorted(checkpoint.directory.glob("rank*.safetensors"))]
    linears = _precisions(checkpoint.authority["tensors"])
    later = _quantized_later(checkpoint.authority)
    if as_json:
        facts = {"directory": str(checkpoint.directory), "rank_bytes": sizes, "precisions": linears}
        click.echo(json.dumps(facts | {"quantized_by_trtllm_build": later}))
        return
    click.echo(f"rank checkpoint  {checkpoint.directory}")
    click.echo(f"  ranks          {len(sizes)}, {', '.join(_mib(size) for size in sizes)}")
    click.echo(f"  linear layers  {_describe_precisions(linears, later)}")
    _print_choices(checkpoint.authority)


def _print_choices(authority: dict[str, Any]) -> None:
    """What a quantized checkpoint's values became, and a mixture as a picture: layers x projections."""
    for note in authority.get("notes") or ():
        click.echo(f"  note           {note}")
    tensors = authority["tensors"]
    origins = Counter(entry["origin"] for entry in tensors.values() if entry.get("origin"))
    for origin, count in sorted(origins.items()):
        click.echo(f"  values         {count} linear layers: {origin}")
    mixture = authority.get("mixture")
    if mixture is None:
        return
    predicted = mixture["predicted_perplexity_increase"]
    click.echo(
        f"  mixture        predicted to raise perplexity by {100 * predicted:.2f} %; `trtbuild verify` measures it"
    )
    for line in draw_mixture(mixture["formats"]):
        click.echo(f"    {line}")


_SIGNS = {"int4": ("4", "red"), "fp8-dynamic": ("f", "yellow"), "int8": ("8", "green")}


def draw_mixture(formats: dict[str, str]) -> list[str]:
    """A line for each projection with a sign for each decoder layer, and what the signs mean; coloured."""
    rows: dict[str, dict[int, str]] = {}
    for name, form in formats.items():
        _, _, layer, projection = name.split(".", 3)
        rows.setdefault(projection, {})[int(layer)] = form
    depth = 1 + max(layer for row in rows.values() for layer in row)
    width = max(map(len, rows))
    lines = []
    for projection in sorted(rows):
        signs = (_sign(rows[projection].get(layer)) for layer in range(depth))
        lines.append(f"{projection:{width}}  {''.join(signs)}")
    used = dict.fromkeys(form for row in rows.values() for form in row.values())
    return [*lines, "layers from left to right; " + ", ".join(f"{_sign(form)} {form}" for form in used)]


def _sign(form: str | None) -> str:
    if form is None:
        return " "
    sign, colour = _SIGNS.get(form, ("#", "blue"))
    return click.style(sign, fg=colour)


def print_engine(report: CompileReport, memory: MemoryReport, as_json: bool) -> None:
    """The engine: what was asked, what the plan verifier found, what it took, and how to ask it something."""
    passport = report.passport
    if as_json:
        facts = {"directory": str(report.directory), "seconds": report.seconds, "memory": memory.to_dict()}
        click.echo(json.dumps({**facts, "passport": passport}))
        return
    layout, limits, targets = passport["layout"], passport["limits"], ", ".join(passport["targets"])
    click.echo(f"engine     {report.directory}" + ("" if report.built else " (already built, unchanged)"))
    click.echo(f"  model    {passport['source']['model']} ({passport['model']['architecture']})")
    experts = f", moe-tp {layout['moe_tp']}, moe-ep {layout['moe_ep']}" if passport["model"]["moe"] else ""
    click.echo(f"  layout   tp {layout['tp']}, pp {layout['pp']}{experts}")
    click.echo(
        f"  limits   {limits['max_batch_size']} slots of {limits['max_seq_len']} tokens, "
        f"prompts up to {limits['max_input_len']}, chunks of {limits['chunk_size']}"
    )
    if passport["tensors"]:
        described = _describe_precisions(_precisions(passport["tensors"]), _quantized_later(passport))
        click.echo(f"  weights  linear layers: {described}")
        _print_choices(passport)
    builder = passport["builder"]
    what, count = "plans  ", len(passport["plans"])
    if builder["name"] == "tensorrt-llm":
        what, count = "engines", layout["tp"] * layout["pp"]
    click.echo(f"  {what}  {count}, {builder['name']} {builder['version']}, for {targets}")
    for plan in passport["plans"]:
        click.echo(f"           {describe_plan(plan)}")
    click.echo(f"  took     {report.seconds:.1f} s")
    if report.built:
        told = "without the cluster's workers"
        if memory.forecast:
            told = f"forecast {_mib(memory.forecast.low)} to {_mib(memory.forecast.high)}"
        click.echo(f"  memory   {_mib(memory.measured)} anonymous at the peak; {told}")
    if report.kernels:
        click.echo(f"  kernels  {report.kernels}")
    click.echo(_after_compile(passport, report.directory.parents[1]))


def _after_compile(passport: dict[str, Any], root: Path) -> str:
    """The next command, or why there is none."""
    place = "" if root.resolve() == Path.cwd() else f" --workspace {shlex.quote(str(root))}"
    if not passport["tensors"]:
        return "  note     plans only: without weights nothing can run it"
    if not any("tokenizer/tokenizer" in file for file in passport["digests"]["tokenizer"]):
        return "  note     the checkpoint has no tokenizer: prompts must be token ids"
    if passport["builder"]["name"] == "tensorrt-llm":
        return f"next: trtbuild package {passport['name']}{place}"
    return f'next: trtbuild generate {passport["name"]} "a prompt"{place}'


def describe_plan(plan: dict[str, Any]) -> str:
    """One line of a plan: its size, scratch, GEMM types and MoE form, as the verifier read them from the plan."""
    found = plan["verification"]
    gemms = Counter[str]()
    for profile in found["gemms"]:
        gemms.update(profile)
    parts = [f"{plan['file']:36} {_mib(plan['size']):>10}", f"scratch {_mib(plan['scratch_bytes']):>10}"]
    parts += [f"world size {found['world_size']}"] if found["world_size"] else []
    parts += [f"MoE {plan['moe_form']}"] if plan["moe_form"] else []
    parts += [f"GEMMs {', '.join(f'{count} {types}' for types, count in sorted(gemms.items()))}"] if gemms else []
    return "  ".join(parts)


def _precisions(tensors: dict[str, Any]) -> dict[str, int]:
    """How many linear layers have each precision; other tensors are keyed by rank and not counted."""
    return dict(Counter(entry["precision"] for name, entry in tensors.items() if not name.startswith("rank")))


def _quantized_later(authority: dict[str, Any]) -> str | None:
    """The algorithm by which trtllm-build quantizes the linear layers, which the rank checkpoint has in 16 bit."""
    from trtbuild.checkpoints.precision import DEFERRED, Precision

    precision = Precision.from_dict(authority["precision"])
    return DEFERRED[precision.weights] if precision.is_deferred else None


def _describe_precisions(linears: dict[str, int], later: str | None) -> str:
    found = ", ".join(f"{count} {name}" for name, count in sorted(linears.items()))
    return f"{found}; trtllm-build quantizes them ({later})" if later else found


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
