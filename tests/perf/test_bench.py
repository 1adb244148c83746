"""`make bench`: what a script adds is dated, and stands beside the last committed figure of the same case."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "bench.py"
MACHINE = {"cpu": "A", "cores": 2}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trtbuild_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_ratios_are_to_the_last_line_of_the_same_case(bench: ModuleType) -> None:
    benchmark = bench.Benchmark("x", ("figure", "threads"), ("ms", "held.p50", "rates", "rounds.mean"))
    old = [
        {"figure": "a", "threads": 1, "ms": 4.0, "date": "2026-01-01", "machine": MACHINE},
        {"figure": "a", "threads": 1, "ms": 2.0, "date": "2026-02-01", "machine": MACHINE},
        {"figure": "a", "threads": 1, "ms": 9.0, "date": "2026-03-01", "machine": {"cpu": "B", "cores": 64}},
        {"figure": "a", "threads": 2, "ms": 7.0, "machine": MACHINE},
    ]
    rounds = [{"mean": 4.0}, {"mean": 6.0}]
    new = [
        {
            "figure": "a",
            "threads": 1,
            "ms": 3.0,
            "held": {"p50": 5},
            "rates": [1.0, 2.0, 9.0],
            "rounds": rounds,
            "machine": MACHINE,
        }
    ]
    found = bench.ratios(benchmark, new, old)
    assert [(one.figure, one.now, one.ratio) for one in found] == [
        ("ms", 3.0, 1.5), ("held.p50", 5.0, None), ("rates", 2.0, None), ("rounds.mean", 5.0, None),
    ]  # fmt: skip
    assert next(bench.table(found)) == "  a, 1: ms 3, 1.500 of 2 (2026-02-01)"
    elsewhere = bench.ratios(benchmark, [{**new[0], "machine": {"cpu": "C", "cores": 1}}], old)
    assert "another machine" in next(bench.table(elsewhere))
    assert bench.ratios(benchmark, [{"figure": "b", "ms": 3.0}], old)[0].ratio is None


def test_lines_without_date_and_machine_get_them(bench: ModuleType, tmp_path: Path) -> None:
    results = tmp_path / "x.jsonl"
    kept = '{"old":   1}'
    results.write_text(kept + '\n{"case": "c", "machine": "x86_64, 1 thread"}\n{"date": "2026-01-01", "cpu": "A"}\n')
    lines = bench.complete(results, 1)
    assert lines[0]["machine"]["cores"] >= 1
    assert len(lines[0]["date"]) == 10
    assert lines[1] == {"date": "2026-01-01", "cpu": "A"}
    assert results.read_text().splitlines()[0] == kept
    assert [json.loads(text) for text in results.read_text().splitlines()[1:]] == lines


def test_every_script_is_known_with_figures_that_its_results_have(bench: ModuleType) -> None:
    known = {one.name: one for one in bench.BENCHMARKS}
    scripts = {file.stem for file in SCRIPT.parent.glob("*.py") if "__main__" in file.read_text()}
    helpers = {"bench", "accuracy_others", "accuracy_ours"}
    assert scripts - helpers <= set(known)
    for one in known.values():
        lines = [json.loads(line) for line in one.results.read_text().splitlines()] if one.results.is_file() else []
        if lines:
            assert [ratio for line in lines for ratio in bench.ratios(one, [line], [])], one.name


def test_the_command_runs_scripts_and_says_which_failed(bench: ModuleType, tmp_path: Path) -> None:
    """In a repository of its own, with one script that works and one that does not."""
    root = tmp_path / "repository"
    (root / "perf" / "results").mkdir(parents=True)
    (root / "perf" / "bench.py").write_text(SCRIPT.read_text())
    line = {"date": "2026-01-01", "figure": "f", "median": 2.0, **bench.machine()}
    (root / "perf" / "results" / "road.jsonl").write_text(json.dumps(line) + "\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    (root / "perf" / "road.py").write_text(
        "import sys\nassert sys.argv[1:] == ['--save']\n"
        "open('perf/results/road.jsonl', 'a').write('{\"figure\": \"f\", \"median\": 3.0}\\n')\n"
    )
    (root / "perf" / "decode.py").write_text("raise SystemExit(7)\n")
    done = subprocess.run(
        [sys.executable, "perf/bench.py", "road", "decode"], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "f: median 3, 1.500 of 2 (2026-01-01)" in done.stdout
    assert "decode, 0 s: ended with 7" in done.stdout
    unknown = subprocess.run([sys.executable, "perf/bench.py", "nothing"], cwd=root, capture_output=True, check=False)
    assert unknown.returncode == 2
