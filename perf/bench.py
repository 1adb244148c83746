"""All benchmarks of ourselves as one command: `make bench`, or `python perf/bench.py [NAME ...] [--list]`.

Each script runs in a process of its own and appends its lines to perf/results/; a line without a date or a machine gets
them here. Beside every figure stands its ratio to the last line that is committed for the same case: a ratio of times
above 1 is slower. Figures of another machine are marked, since their ratio says little. Ends with 1 where a script
failed; the others ran all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
CHECKPOINTS = ROOT / "tests" / "checkpoints"


@dataclass(frozen=True)
class Benchmark:
    """A script, its results file, what of a line is the case and what are figures (a.b is b in a; of lists the median).

    {scratch} in `arguments` is an empty directory, {results} the results file. `why_not` is why it is not run by
    default: what it needs besides this repository.
    """

    name: str
    case: tuple[str, ...]
    figures: tuple[str, ...]
    arguments: tuple[str, ...] = ("--save",)
    why_not: str | None = None

    @property
    def script(self) -> Path:
        return HERE / f"{self.name}.py"

    @property
    def results(self) -> Path:
        return RESULTS / f"{self.name}.jsonl"


TINY = str(CHECKPOINTS / "tiny-mixtral")
BENCHMARKS = (
    Benchmark("road", ("figure",), ("median",)),
    Benchmark("decode", ("figure", "dtype", "threads"), ("transformers", "reference", "median_speedup")),
    Benchmark(
        "conversion", ("case", "workers", "source_bytes"), ("seconds", "ratio", "mb_per_cpu_second", "peak_bytes")
    ),
    Benchmark("planning", ("figure",), ("seconds", "cpu_seconds", "anonymous_bytes")),
    Benchmark("scale", ("figure", "workers"), ("seconds", "peak_anonymous_mib")),
    Benchmark(
        "serving",
        ("figure", "road", "concurrency"),
        ("tokens_per_s", "itl_ms.p50", "added_ms.p50", "cpu_ms_per_token.all"),
    ),
    Benchmark("client_cost", ("figure",), ("median",)),
    Benchmark(
        "drivers", ("figure", "driver", "concurrency", "osl", "step_ms"),
        ("output_tokens_per_s.mean", "ttft_ms.mean", "itl_ms.mean"),
        why_not="needs perf_analyzer and aiperf",
    ),
    Benchmark(
        "accuracy", ("model", "inputs", "ours", "method", "threads"), ("seconds", "cpu_seconds", "peak_anon_bytes")
    ),
    Benchmark("rounding", ("model", "inputs", "text"), ("stdev",)),
    Benchmark("auto", ("model", "inputs", "method"), ("seconds", "cpu_seconds", "linear_bytes")),
    Benchmark(
        "guided", ("case", "vocab_size", "tokenizer"), ("compile_ms", "mask_ms.p50", "accept_ms.p50", "vocabulary_s"),
        (TINY, "1024", "{results}"),
    ),
    Benchmark(
        "verify", ("model", "precision", "threads"), ("seconds", "cpu_seconds", "peak_anon_bytes"),
        ("--workspace", "{scratch}", "--save"),
    ),
    Benchmark(
        "spreading", ("precision", "workers", "source_bytes"), ("seconds.local", "seconds.ray_cold", "seconds.ray_warm")
    ),
    Benchmark("gpu_check", ("figure", "precision", "executor"), ("seconds", "tokens_per_s"), why_not="needs a GPU"),
)  # fmt: skip


@dataclass
class Outcome:
    """Of one script: lines that it added, or why it failed."""

    benchmark: Benchmark
    seconds: float
    lines: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None


def run(benchmark: Benchmark) -> Outcome:
    """The script in its process; what it prints goes through."""
    before = _num_lines(benchmark.results)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trtbuild-bench-") as scratch:
        places = {"scratch": scratch, "results": str(benchmark.results)}
        arguments = [argument.format(**places) for argument in benchmark.arguments]
        done = subprocess.run([sys.executable, str(benchmark.script), *arguments], cwd=ROOT, check=False)
    lines = complete(benchmark.results, before)
    failure = f"ended with {done.returncode}" if done.returncode else None if lines else "wrote no line"
    return Outcome(benchmark, time.monotonic() - begun, lines, failure)


def _num_lines(results: Path) -> int:
    return len(results.read_text(encoding="utf-8").splitlines()) if results.is_file() else 0


def complete(results: Path, num_before: int) -> list[dict[str, Any]]:
    """The lines after the first `num_before`, each with date and machine; the file is rewritten where one lacked."""
    if not results.is_file():
        return []
    texts = results.read_text(encoding="utf-8").splitlines()
    lines = [json.loads(text) for text in texts[num_before:]]
    dated = [_dated(line) for line in lines]
    if dated != lines:
        whole = [*texts[:num_before], *(json.dumps(line) for line in dated)]
        temporary = results.with_suffix(".tmp")
        temporary.write_text("\n".join(whole) + "\n", encoding="utf-8")
        temporary.replace(results)
    return dated


def _dated(line: dict[str, Any]) -> dict[str, Any]:
    date = line.get("date") or line.get("time") or time.strftime("%Y-%m-%d", time.gmtime())
    if isinstance(line.get("machine"), dict) or "cpu" in line:
        return {**line, "date": date}
    return {**line, "date": date, "machine": machine()}


def machine() -> dict[str, Any]:
    """What decides how fast this machine is; its name is nobody's business."""
    with Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(), "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(), "load": os.getloadavg()[0],
    }  # fmt: skip


def committed(results: Path, root: Path = ROOT) -> list[dict[str, Any]]:
    """The lines of the last commit; none where git or the file is not there."""
    name = results.resolve().relative_to(root.resolve()).as_posix()
    done = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=root, capture_output=True, text=True, check=False)
    return [json.loads(line) for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


@dataclass(frozen=True)
class Ratio:
    """One figure beside the committed one; `before` and `ratio` are None where there is none."""

    case: str
    figure: str
    now: float
    before: float | None
    date_before: str | None
    machine: str
    """Of the committed line: "", "another machine" or "machine not known"."""

    @property
    def ratio(self) -> float | None:
        return self.now / self.before if self.before else None


def ratios(benchmark: Benchmark, lines: Sequence[Mapping[str, Any]], old: Sequence[Mapping[str, Any]]) -> list[Ratio]:
    """Of every figure of every line; a case is compared with its last line among `old`, one of this machine first."""
    found = []
    for line in lines:
        case = _case(benchmark, line)
        earlier = [one for one in old if _case(benchmark, one) == case]
        alike = [one for one in earlier if _hardware(one) == _hardware(line)]
        last = (alike or earlier or [None])[-1]
        label = ", ".join(str(value) for value in case if value is not None)
        for figure in benchmark.figures:
            now = _number(line, figure)
            if now is not None:
                before = None if last is None else _number(last, figure)
                date = None if last is None else last.get("date") or last.get("time")
                found.append(Ratio(label, figure, now, before, date, _other_machine(last, line)))
    return found


def _case(benchmark: Benchmark, line: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(_at(line, key) for key in benchmark.case)


def _hardware(line: Mapping[str, Any]) -> tuple[Any, Any]:
    """Processor and cores; (None, None) where the line does not say."""
    machine = line.get("machine")
    held = machine if isinstance(machine, dict) else line
    return held.get("cpu"), held.get("cores")


def _other_machine(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    if before is None or _hardware(before) == _hardware(now):
        return ""
    return "machine not known" if _hardware(before) == (None, None) else "another machine"


def _at(line: Any, key: str) -> Any:
    """Of a list, what each of its members has there."""
    if isinstance(line, list):
        return [_at(one, key) for one in line]
    name, _, rest = key.partition(".")
    value = line.get(name) if isinstance(line, Mapping) else None
    return _at(value, rest) if rest else value


def _number(line: Mapping[str, Any], key: str) -> float | None:
    value = _at(line, key)
    if isinstance(value, list) and value and all(isinstance(one, (int, float)) for one in value):
        value = statistics.median(value)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def table(found: Sequence[Ratio]) -> Iterator[str]:
    """A line for each figure."""
    for one in found:
        if one.ratio is None:
            yield f"  {one.case}: {one.figure} {one.now:.4g} (first)"
        else:
            where = f", {one.machine}" if one.machine else ""
            yield (
                f"  {one.case}: {one.figure} {one.now:.4g}, {one.ratio:.3f} of {one.before:.4g} "
                f"({one.date_before or 'undated'}{where})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="[default: all that need nothing else]")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    known = {one.name: one for one in BENCHMARKS if one.script.is_file()}
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(known)}")
    if options.list:
        for one in known.values():
            print(f"{one.name:12} {' '.join(one.arguments)}{f'   ({one.why_not})' if one.why_not else ''}")
        return
    chosen = [known[name] for name in options.names] or [one for one in known.values() if one.why_not is None]
    outcomes = []
    for one in chosen:
        print(f"== {one.name}", flush=True)
        outcomes.append(run(one))
    print("\nratios to the last committed lines")
    for outcome in outcomes:
        print(
            f"{outcome.benchmark.name}, {outcome.seconds:.0f} s" + (f": {outcome.failure}" if outcome.failure else "")
        )
        for line in table(ratios(outcome.benchmark, outcome.lines, committed(outcome.benchmark.results))):
            print(line)
    if any(outcome.failure for outcome in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
