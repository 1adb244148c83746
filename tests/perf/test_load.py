"""When requests are due, and what their prompts hold."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trtbuild.errors import Refused
from trtbuild.perf.load import Due, Prompts, num_processes, open_loop, read_trace, why_unfit
from trtbuild.perf.records import Load, PointSpec, PromptLimits

LIMITS = PromptLimits(256, 200, 4, 100, (0, 5))
RATE = PointSpec("m", "native", Load("rate", 8.0, "poisson"), 20, 10)


def test_poisson_gaps_are_exponential_and_repeatable() -> None:
    times = [due.at_s for due in itertools.islice(open_loop(RATE), 20_000)]
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 8, rel=0.03)
    assert times[:9] == [due.at_s for due in itertools.islice(open_loop(RATE), 9)]
    assert times[:9] != [due.at_s for due in itertools.islice(open_loop(replace(RATE, seed=1)), 9)]


def test_constant_arrivals_do_not_drift() -> None:
    spec = replace(RATE, load=Load("rate", 3.0, "constant"))
    assert next(itertools.islice(open_loop(spec), 30_000, None)).at_s == 10_000.0


def test_trace(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(
        '{"timestamp": 5000, "input_length": 12, "output_length": 3, "hash_ids": [1]}\n\n'
        '{"timestamp": 5500, "input_length": 7, "output_length": 9}\n'
    )
    assert read_trace(file, faster=2.0) == [Due(0.0, 12, 3), Due(0.25, 7, 9)]
    spec = replace(RATE, load=Load("trace", 1.0, "constant", str(file)))
    assert why_unfit(spec, LIMITS) is None
    assert "osl 9 is above the engine's max_seq_len 15" in (why_unfit(spec, replace(LIMITS, max_seq_len=15)) or "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no request"),
        ("{}", "line 1: needs timestamp"),
        ("nonsense", "line 1"),
        ('{"timestamp": -1, "input_length": 1, "output_length": 1}', "must be numbers"),
        ('{"timestamp": 1, "input_length": 0, "output_length": 1}', "above 0"),
        (
            '{"timestamp": 2, "input_length": 1, "output_length": 1}\n'
            '{"timestamp": 1, "input_length": 1, "output_length": 1}',
            "must not go back",
        ),
    ],
)
def test_bad_trace(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace.jsonl").write_text(text)
    with pytest.raises(Refused, match=said):
        read_trace(tmp_path / "trace.jsonl")


def test_prompts_have_the_length_and_no_special_token() -> None:
    prompts = Prompts(LIMITS, seed=3, shared_prefix=8)
    made = [prompts.ids(number, length) for number, length in enumerate((1, 8, 9, 200))]
    assert [len(ids) for ids in made] == [1, 8, 9, 200]
    assert not {0, 5} & set(np.concatenate(made).tolist())
    assert all(ids.max() < 100 for ids in made)
    assert made[1].tolist() == made[3][:8].tolist()
    assert made[3].tolist() == Prompts(LIMITS, 3, 8).ids(3, 200).tolist()
    assert made[3].tolist() != prompts.ids(4, 200).tolist()


@pytest.mark.parametrize(
    ("load", "wanted"), [(Load("concurrency", 16), 1), (Load("concurrency", 64), 4), (RATE.load, 1)]
)
def test_enough_processes(load: Load, wanted: int) -> None:
    assert num_processes(replace(RATE, load=load), cores=8) == wanted
    # 1000 requests of 10 tokens per second are work for 5 processes; a machine of 2 cores gives 2.
    assert [num_processes(replace(RATE, load=Load("rate", 1000.0, "constant")), cores) for cores in (8, 2)] == [6, 2]
