"""A fuzzer of what a checkpoint is read from: config.json, the index, safetensors headers.

Runs in a process of its own, with little memory and a time limit for every input: `python fuzz_inputs.py COUNT`.
Prints what happened to the inputs as JSON. Only `TrtBuildError` may come out of reading one.
"""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_seeds import CONFIGS, tiny_checkpoint
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from trtbuild.checkpoints.hf_config import read_config
from trtbuild.checkpoints.layout import Layout
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import Precision
from trtbuild.checkpoints.rank_plan import plan_rank
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.source_files import INDEX_FILE
from trtbuild.checkpoints.source_tensors import expected_shapes
from trtbuild.checkpoints.tensorrt_llm_config import tensorrt_llm_config
from trtbuild.errors import TrtBuildError

MEMORY_BYTES = 3 << 29
# Of the clock, on a busy machine; the counter says how much CPU time the slowest took.
SECONDS_PER_INPUT = 30.0
# Plans of larger models are as valid, and take longer to write down than a fuzzer has.
MAX_PARTS = 3000
LONGEST_MESSAGE = 70_000
RUN = 5000

NUMBERS = [
    0, 1, -1, 2, 3, 7, 8, 64, 127, 1024, 1025, 2**31 - 1, 2**31, 2**63, 10**9, 10**12, 10**400, 0.5, -0.0, 1e-300, 1e18,
    1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
WORDS = ["", "silu", "yarn", "default", "llama3", "linear", "greedy", "\x1b[2J\n", "\ud800", "x" * 5000, "1", "BF16"]
SCALARS = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.none(), st.booleans(), st.integers(-9, 300))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "a"]), inner)
    ),
    max_leaves=4,
)
ALL_KEYS = sorted({key for config in CONFIGS for key in config} | {"num_local_experts", "dtype", "rope_parameters"})
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "mscale", "truncate", "x"]
DIRECTORY = Path(tempfile.mkdtemp(prefix="fuzz-"))
outcomes: Counter[str] = Counter()
slowest = 0.0


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A valid config of some family with a few values changed, added or gone."""
    config = dict(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.integers(0, 9))
        key = draw(st.sampled_from(sorted(config) if kind < 7 and config else ALL_KEYS))
        if kind == 0:
            config.pop(key, None)
        elif kind == 1:
            rope = config.get("rope_scaling")
            config["rope_scaling"] = {
                **(rope if isinstance(rope, dict) else {}),
                draw(st.sampled_from(ROPE_KEYS)): draw(SCALARS),
            }
        else:
            config[key] = draw(st.sampled_from(NUMBERS) if kind < 6 else VALUES)
    return config


@st.composite
def noise(draw: st.DrawFn, content: bytes, reach: int) -> bytes:
    """Bytes overwritten, inserted, removed or cut off, mostly within the first `reach`."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, min(reach, len(changed)) - 1)))
        kind, data = draw(st.integers(0, 3)), draw(st.binary(min_size=1, max_size=8))
        if kind == 0:
            changed[start : start + len(data)] = data
        elif kind == 1:
            changed[start:start] = data
        elif kind == 2:
            del changed[start : start + len(data)]
        elif draw(st.integers(0, 3)) == 0:
            del changed[start:]
    return bytes(changed)


@st.composite
def headers(draw: st.DrawFn, content: bytes) -> bytes:
    """The file with a few fields of its JSON header changed."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(header) or ["a"]))
        kind = draw(st.integers(0, 4))
        if kind == 0:
            header.pop(name, None)
        elif kind == 1:
            header[draw(st.sampled_from([*WORDS, "__metadata__", "model.norm.weight"]))] = header.get(
                name, draw(VALUES)
            )
        elif kind == 2:
            header[name] = draw(VALUES)
        elif isinstance(header.get(name), dict):
            field = draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            pair = st.lists(st.sampled_from(NUMBERS) | st.integers(0, 5000), min_size=2, max_size=2)
            header[name] = {**header[name], field: draw(pair | VALUES)}
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return (
        struct.pack("<Q", draw(st.sampled_from([len(text)] * 8 + [0, 2**64 - 1, 10**8]))) + text + content[8 + length :]
    )


def guarded(kind: str, work: Any) -> None:
    """Count what becomes of one input; anything but acceptance or a clear error gets out and ends the run."""
    global slowest  # noqa: PLW0603
    started = time.process_time()
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_INPUT)
    try:
        work()
    except TrtBuildError as error:
        outcomes[f"{kind} refused"] += 1
        assert len(error.message) < LONGEST_MESSAGE
        assert all(c.isprintable() or c == "\n" for c in error.message), error.message
    else:
        outcomes[f"{kind} accepted"] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    slowest = max(slowest, time.process_time() - started)


def numbers_of(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from numbers_of(item)
    elif isinstance(value, int | float):
        yield value


def use_config(hf: dict[str, Any], sizes: tuple[int, int, int], precision: Any) -> None:
    """Everything that conversion does with a config before it reads a weight."""
    config = read_config(hf)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert math.isfinite(config.attention_scale)
    assert all(math.isfinite(float(value)) for value in numbers_of(config.to_dict()))
    experts = config.moe.num_experts if config.moe else 1
    if config.num_layers * max(experts, config.num_heads) > MAX_PARTS:
        return
    assert all(size > 0 for shape in expected_shapes(config).values() for size in shape)
    tp, pp, moe_ep = sizes
    layout = Layout.resolve(tp, pp, None, moe_ep)
    layout.check(config)
    wanted = Precision.resolve(precision, config.dtype)
    for rank in layout.ranks():
        plan = plan_rank(config, rank, wanted)
        assert all(size > 0 for spec in plan.tensors() for size in spec.shape)
        assert plan.cache_shapes()
    json.dumps(tensorrt_llm_config(config, layout, wanted))


def fuzz_config(first: int, examples: int) -> None:
    layouts = st.sampled_from([(1, 1, 1), (2, 1, 1), (4, 2, 2), (2, 3, 2), (8, 1, 8)])

    @seed(first)
    @settings(_settings(), max_examples=examples)
    @given(configs(), layouts, st.sampled_from(["bf16", "fp8", "int4", "int8"]))
    def run(hf: dict[str, Any], sizes: tuple[int, int, int], precision: str) -> None:
        guarded("config", lambda: use_config(hf, sizes, precision))

    run()


def fuzz_files(first: int, examples: int, pristine: dict[str, bytes]) -> None:
    """Damage one file of a sharded checkpoint and open it, as `convert` does."""
    names = ["config.json", INDEX_FILE, *sorted(name for name in pristine if name.endswith(".safetensors"))]
    reach = {name: 12 + struct.unpack("<Q", pristine[name][:8])[0] for name in names[2:]}
    damaged = st.one_of(
        *(st.tuples(st.just(name), noise(pristine[name], reach.get(name, len(pristine[name])))) for name in names),
        *(st.tuples(st.just(name), headers(pristine[name])) for name in names[2:]),
    )

    @seed(first)
    @settings(_settings(), max_examples=examples)
    @given(damaged)
    def run(case: tuple[str, bytes]) -> None:
        name, content = case
        (DIRECTORY / "tiny" / name).write_bytes(content)
        guarded("files", lambda: CheckpointSource.open(str(DIRECTORY / "tiny")))
        (DIRECTORY / "tiny" / name).write_bytes(pristine[name])

    run()


def _settings() -> settings:
    checks = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ]
    return settings(deadline=None, database=None, suppress_health_check=checks, phases=[Phase.generate, Phase.shrink])


def main() -> None:
    count = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))

    def too_slow(*_: object) -> None:
        raise TimeoutError(f"an input took more than {SECONDS_PER_INPUT} s")

    signal.signal(signal.SIGALRM, too_slow)
    started = time.perf_counter()
    try:
        pristine = tiny_checkpoint(DIRECTORY / "tiny")
        # hypothesis remembers every example of a run; several runs take less memory.
        for first in range(0, count, RUN):
            examples = min(RUN, count - first)
            fuzz_config(first, examples // 2)
            fuzz_files(first + 1, examples - examples // 2, pristine)
    finally:
        shutil.rmtree(DIRECTORY)
    # Not getrusage: its peak is that of whoever started this process, where that was larger.
    peak = int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    counters = {
        "inputs": sum(outcomes.values()),
        **dict(sorted(outcomes.items())),
        "slowest_cpu_s": round(slowest, 3),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mib": round(peak),
    }
    sys.stdout.write(json.dumps(counters) + "\n")


if __name__ == "__main__":
    main()
