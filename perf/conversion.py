"""Conversion against cp: `python perf/conversion.py [--layers N] [--repeat N] [--save]`.

A random Mixtral (hidden 1024, expert 3584, 8 experts, 32000 tokens; 9 layers are 1.77 GB in bf16) is converted to tp 2.
Every run is paired with a `cp --reflink=never` of the same bytes on the same file system right before it, caches warm.
cp's time is given without fsync and with. Ours is everything that `trtbuild convert` does in its process after the
imports: reading, the NaN scan, content digests of source and result, manifest, journal, and fsync; "no-fsync" leaves
the last out, as cp does. Memory is the peak of RssAnon beyond that of the interpreter with torch and trtbuild loaded.
fp8 is given its activation ranges. --others names a Python in which llm-compressor and ModelOpt are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "conversion.jsonl"
CASES = [(p, workers) for p in ("bf16", "bf16 no-fsync", "fp16", "int8", "int4", "fp8") for workers in (1, 2)]
# Other tools on the same files, by a Python that has them (--others); each quantizes weights only, without calibration.
OTHERS = ["llm-compressor W4A16", "llm-compressor FP8", "ModelOpt INT4"]
# Issue 3's figures for others, of another day: one core, a checkpoint of 988 MB.
RECORDED = [
    ("llm-compressor model_free_ptq W4A16", 17.0, 1194),
    ("llm-compressor model_free_ptq FP8", 20.0, 964),
    ("ModelOpt INT4", 20.0, 2312),
    ("safetensors load and save", 3.0, 482),
]

CHILD = """
import json, sys, threading, time
from pathlib import Path

def anonymous():
    [line] = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024

def measured(work):
    base, peak, stop = anonymous(), [0], threading.Event()
    def poll():
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous())
    thread = threading.Thread(target=poll)
    thread.start()
    started, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    stop.set()
    thread.join()
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": max(0, peak[0] - base)}))

case, workers, source, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4])
if case == "safetensors":
    from safetensors.torch import load_file, save_file
    import torch
    torch.zeros(1)
    measured(lambda: save_file(load_file(source / "model.safetensors"), out))
elif case.startswith("llm-compressor"):
    from llmcompressor import model_free_ptq
    scheme = {"W4A16": "W4A16", "FP8": "FP8_DYNAMIC"}[case.split()[1]]
    kept = ["lm_head", "model.embed_tokens", "re:.*block_sparse_moe.gate$"]
    measured(lambda: model_free_ptq(source, out, scheme=scheme, ignore=kept, max_workers=workers, device="cpu"))
elif case.startswith("ModelOpt"):
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM
    def quantize():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        export_hf_checkpoint(mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG), export_dir=out)
    measured(quantize)
else:
    from trtbuild.checkpoints.convert import ActivationRange, Calibration, convert
    from trtbuild.checkpoints.layout import Layout
    from trtbuild.checkpoints.precision import Precision
    from trtbuild.checkpoints.rank_plan import plan_rank
    from trtbuild.checkpoints.source import CheckpointSource
    opened = CheckpointSource.open(str(source))
    plan = plan_rank(opened.config, Layout().rank(0), Precision("fp8", "bf16"))
    ranges = {linear.global_name: ActivationRange(3.0) for linear in plan.linears}
    calibration = Calibration({}, lambda: ranges) if case == "fp8" else None
    precision = Precision(case, "fp16" if case == "fp16" else "bf16")
    if "no-fsync" in sys.argv:
        import os
        os.fsync = os.fdatasync = lambda descriptor: None
    measured(lambda: convert(opened, out, Layout.resolve(2), precision, workers=workers, calibration=calibration))
"""


def make_model(directory: Path, layers: int, hidden: int) -> int:
    """Write the random model; its size in bytes."""
    import torch
    from safetensors.torch import save_file

    inner, vocab, experts, kv = hidden * 7 // 2, 32000, 8, hidden // 2
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128, "num_local_experts": experts, "num_experts_per_tok": 2,
        "vocab_size": vocab, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    weights = {name: random(vocab, hidden) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    weights["model.norm.weight"] = random(hidden)
    for layer in range(layers):
        name = f"model.layers.{layer}."
        weights |= {f"{name}{norm}_layernorm.weight": random(hidden) for norm in ("input", "post_attention")}
        for part, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            weights[f"{name}self_attn.{part}_proj.weight"] = random(rows, hidden)
        weights[f"{name}block_sparse_moe.gate.weight"] = random(experts, hidden)
        for expert in range(experts):
            for part, shape in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                weights[f"{name}block_sparse_moe.experts.{expert}.{part}.weight"] = random(*shape)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(weights, directory / "model.safetensors")
    return (directory / "model.safetensors").stat().st_size


def copy(source: Path, target: Path) -> dict[str, float]:
    """Seconds of cp, and of cp with an fsync of what it wrote."""
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "--reflink=never", str(source / "model.safetensors"), str(target)], check=True)
    copied = time.perf_counter()
    subprocess.run(["sync", str(target)], check=True)
    synced = time.perf_counter()
    target.unlink()
    return {"cp": copied - started, "cp_fsync": synced - started}


def run_child(python: str, case: str, workers: int, source: Path, out: Path) -> dict[str, float]:
    os.sync()
    command = [python, "-c", CHILD, case.removesuffix(" no-fsync"), str(workers), str(source), str(out)]
    command += ["no-fsync"] if case.endswith(" no-fsync") else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{case} ended with {done.returncode}:\n{done.stderr}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return json.loads(done.stdout.splitlines()[-1])


def measure(source: Path, scratch: Path, repeat: int, only: list[str], others: str | None) -> Iterator[dict[str, Any]]:
    """Medians of the cases (all, unless some are named), each run paired with a cp."""
    size = (source / "model.safetensors").stat().st_size
    cases = [(sys.executable, case, workers) for case, workers in [*CASES, ("safetensors", 1)]]
    cases += [(others, case, 1) for case in OTHERS] if others else []
    for python, case, workers in cases:
        if only and case not in only:
            continue
        runs = []
        for _ in range(repeat):
            copied = copy(source, scratch / "copy")
            run = run_child(python, case, workers, source, scratch / "out")
            per_cp = {"ratio": run["seconds"] / copied["cp"], "ratio_fsync": run["seconds"] / copied["cp_fsync"]}
            runs.append({**copied, **run, **per_cp})
        middle = {key: round(statistics.median(run[key] for run in runs), 3) for key in runs[0]}
        middle["mb_per_cpu_second"] = round(size / middle["cpu_seconds"] / 1e6)
        print(
            f"{case:20} {workers} workers {middle['seconds']:6.2f} s   {middle['ratio']:5.2f} x cp   "
            f"{middle['ratio_fsync']:5.2f} x cp + fsync   {middle['mb_per_cpu_second']:5} MB/s per core   "
            f"{middle['peak_bytes'] / 2**20:6.1f} MiB",
            flush=True,
        )
        yield {"case": case, "workers": workers, "source_bytes": size, "runs": repeat, **middle}


def machine() -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    versions = {name: version(name) for name in ("torch", "safetensors", "xxhash", "trtbuild")}
    cpu = models[0] if models else platform.machine()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    } | versions


def other_versions(python: str) -> dict[str, str]:
    """Versions of the other tools, by the Python that has them."""
    names = ["llmcompressor", "compressed-tensors", "nvidia-modelopt", "torch", "transformers"]
    code = f"import json; from importlib.metadata import version; print(json.dumps({{n: version(n) for n in {names}}}))"
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--only", action="append", default=[], metavar="CASE", help="bf16, ..., safetensors; repeatable."
    )
    parser.add_argument("--others", metavar="PYTHON", help="A Python with llmcompressor and nvidia-modelopt.")
    parser.add_argument("--scratch", type=Path, help="Where to write; the file system matters.  [default: /tmp]")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    common = {"date": time.strftime("%Y-%m-%d"), "largest_matrix_bytes": 32000 * options.hidden * 2}
    with tempfile.TemporaryDirectory(dir=options.scratch) as directory:
        source = Path(directory) / "model"
        source.mkdir()
        make_model(source, options.layers, options.hidden)
        for figure in measure(source, Path(directory), options.repeat, options.only, options.others):
            if options.save:
                tools = {"tools": other_versions(options.others)} if figure["case"] in OTHERS else {}
                save({"measured": True, **figure, **common, **tools, "machine": machine()})
    for name, seconds, mebibytes in [] if options.only or options.others else RECORDED:
        print(f"{name:36} {seconds:5.1f} s   {mebibytes} MiB   (recorded in the issue: one core, 988 MB; not run here)")
        recorded = {"measured": False, "case": name, "source_bytes": 988_000_000, "seconds": seconds}
        if options.save:
            save({**recorded, "peak_bytes": mebibytes * 2**20, "cores": 1, "from": "issue 3"})


def save(figure: dict[str, Any]) -> None:
    """Append one JSON line."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(figure) + "\n")


if __name__ == "__main__":
    main()
