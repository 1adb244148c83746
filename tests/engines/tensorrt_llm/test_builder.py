"""The builder tensorrt-llm, against a stand-in for the package with 1.2's flags and files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trtbuild.containers import Installed
from trtbuild.engines.compile import CompileReport
from trtbuild.engines.device.gpu import Gpu
from trtbuild.engines.job import Job, convert_model
from trtbuild.engines.passport import Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.engines.tensorrt_llm.builder import TrtllmJob, compile_trtllm
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.engines.tensorrt_llm.machine import BuildMachine
from trtbuild.engines.upload import upload_engine
from trtbuild.errors import CheckFailed, CheckpointError, EngineBuildError, Refused
from trtbuild.inventory import check_contents, inventory
from trtbuild.planning.watched_compile import MemoryReport
from trtbuild.report import print_engine
from trtbuild.workspace import REQUEST_FILE, Workspace

TESTS = Path(__file__).parents[2]
FAKE = TESTS / "fake_tensorrt_llm"
TINY = TESTS / "checkpoints" / "tiny-mixtral"


def machine(version: str | None = "1.2.1", *, sm: int = 90, gpus: int = 2, tensorrt: str | None = None) -> BuildMachine:
    found = [Gpu(i, "NVIDIA H100 80GB HBM3", f"sm{sm}", "590.48.01", 80 << 30) for i in range(gpus)]
    return BuildMachine(Installed(version, tensorrt), found)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The stand-in where the ranks' processes look."""
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.delenv("FAKE_TRTLLM", raising=False)
    return monkeypatch


def job(**fields: Any) -> Job:
    fields = {"model": str(TINY), "builder": "tensorrt-llm", "name": "tiny", "tp": 2, "max_seq_len": 128} | fields
    return Job.resolve(Recipe.create(**fields))


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with the rank checkpoint that most tests build from."""
    place = tmp_path_factory.mktemp("converted")
    convert_model(job(), Workspace(place), workers=1)
    return place


@pytest.fixture
def place(converted: Path, tmp_path: Path) -> Path:
    """A workspace of its own, whose rank checkpoint is made."""
    shutil.copytree(converted, tmp_path, dirs_exist_ok=True, copy_function=os.link)
    return tmp_path


def build(place: Path, here: BuildMachine | None = None, **fields: Any) -> CompileReport:
    return compile_trtllm(job(**fields), Workspace(place), machine=here or machine())


def test_engine_directory(tmp_path: Path, fake: pytest.MonkeyPatch) -> None:
    report = build(tmp_path, precision="fp8", kv_cache="fp8", trtllm={"tokens_per_block": 64})
    assert report.built
    engine = TrtllmEngine.open(report.directory)
    assert (engine.world_size, engine.tp, engine.max_batch_size, engine.max_seq_len) == (2, 2, 8, 128)
    assert (engine.quant_algo, engine.kv_cache_quant_algo, engine.tokens_per_block) == ("FP8", "FP8", 64)
    assert engine.plugins["use_fp8_context_fmha"] is True
    assert engine.plugins["gemm_plugin"] is None
    names = {file.name for file in report.directory.iterdir()}
    files = {"config.json", "rank0.engine", "rank1.engine", "engine.json", "tokenizer", "model_card"}
    assert names - {REQUEST_FILE} == files
    passport = Passport.open(report.directory)
    assert passport.builder_name == "tensorrt-llm"
    assert passport.data["targets"] == ["sm90"]
    assert passport.data["builder"]["version"] == "1.2.1"
    assert set(passport.data["digests"]["engines"]) == {"rank0.engine", "rank1.engine", "config.json"}
    assert passport.data["builder"]["flags"]["tokens_per_block"] == 64
    passport.check_files()
    assert not build(tmp_path, precision="fp8", kv_cache="fp8", trtllm={"tokens_per_block": 64}).built
    assert (tmp_path / "build" / ".timing_cache" / "1.2.1-nvidia-h100-80gb-hbm3.cache").read_bytes() == b"timing"
    (report.directory / "rank1.engine").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"rank1\.engine differs"):
        passport.check_files()
    with pytest.raises(Refused, match="trtbuild package tiny"):
        passport.check_runnable()


def test_a_built_engine_is_listed_checked_and_uploaded(tmp_path: Path, fake: pytest.MonkeyPatch) -> None:
    engine = build(tmp_path, tp=1).directory
    items = [item for item in inventory(Workspace(tmp_path)) if item.stage == "engines"]
    assert [(item.name, item.state) for item in items] == [("tiny", "complete")]
    assert "plans only" not in items[0].about
    assert items[0].about.endswith(", verify cannot run it")
    assert list(check_contents(items)) == [(items[0], None)]
    sent = upload_engine(engine, f"file://{tmp_path}/store")
    stored = {file.name for file in (tmp_path / "store" / "tiny").iterdir()}
    assert sent.num_sent == sent.num_files
    assert {"rank0.engine", "config.json", "engine.json", "manifest.json"} <= stored
    (engine / "rank0.engine").write_bytes(b"other")
    [(_, problem)] = check_contents(items)
    assert problem is not None and "rank0.engine differs" in problem


def test_what_compile_says_at_its_end(
    place: Path, fake: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that comes next is one that takes such an engine."""
    print_engine(build(place), MemoryReport(1 << 20, None), False)
    said = capsys.readouterr().out
    assert "  engines  2, tensorrt-llm 1.2.1, for sm90\n" in said
    assert said.splitlines()[-1] == f"next: trtbuild package tiny --workspace {place}"


def test_rebuild_command_is_the_recipe(place: Path, fake: pytest.MonkeyPatch) -> None:
    report = build(place, trtllm={"use_fused_mlp": "disable", "weight_sparsity": True})
    words = report.passport["rebuild"].split()
    assert [words[i + 1] for i, word in enumerate(words) if word == "--trtllm"] == [
        "use_fused_mlp=disable", "weight_sparsity=true"
    ]  # fmt: skip
    again = Recipe.create(model="m", trtllm=("use_fused_mlp=disable", "weight_sparsity=true", "max-num-tokens=512"))
    assert again.trtllm == {"use_fused_mlp": "disable", "weight_sparsity": True, "max_num_tokens": 512}


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("crash:1", r"rank 1: .*Engine building failed"),
        ("kill:1", r"rank 1: it was killed.*--workers 1"),
        ("oom:1", r"rank 1: the GPU's memory is full"),
        ("empty:1", r"rank 1: it said that it succeeded, and wrote no rank1\.engine"),
        ("drop-rank:1", r"rank 1: it said that it succeeded, and wrote no rank1\.engine"),
        ("half:1", r"rank 1: it was killed"),
    ],
)
def test_failed_rank_is_built_again_alone(place: Path, fake: pytest.MonkeyPatch, trouble: str, message: str) -> None:
    fake.setenv("FAKE_TRTLLM", trouble)
    with pytest.raises(EngineBuildError, match=message) as error:
        build(place)
    assert "rank 0" not in error.value.message
    assert "the 1 ranks that are done stay" in error.value.message
    partial = place / "engines" / ".tiny.partial"
    assert not (place / "engines" / "tiny").exists()
    before = (partial / "rank0.engine").stat().st_mtime_ns
    # Rank 0 would fail now.
    fake.setenv("FAKE_TRTLLM", "crash:0")
    report = build(place)
    assert (report.directory / "rank0.engine").stat().st_mtime_ns == before
    assert (report.directory / "rank1.engine").read_bytes().startswith(b"ftrtrank 1 of")
    assert list(report.passport["builder"]["seconds"]) == ["1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("max_batch_size=4", "--max_batch_size 8 became 4"),
        ("use_paged_context_fmha=false", "--use_paged_context_fmha enable became False"),
        ("gpt_attention_plugin=null", "--gpt_attention_plugin auto became None"),
        ('kv_cache_type="CONTINUOUS"', "--kv_cache_type paged became 'CONTINUOUS'"),
    ],
)
def test_silently_changed_flag_is_an_error(place: Path, fake: pytest.MonkeyPatch, change: str, message: str) -> None:
    fake.setenv("FAKE_TRTLLM", f"change:{change}")
    with pytest.raises(CheckFailed) as error:
        build(place)
    assert message in error.value.message
    assert not (place / "engines" / "tiny").exists()


@pytest.mark.parametrize(
    ("precision", "tp"), [("bf16", 1), ("bf16", 2), ("fp16", 2), ("fp8", 2), ("int8", 2), ("int4", 1)]
)
def test_no_derived_flag_is_changed(tmp_path: Path, fake: pytest.MonkeyPatch, precision: str, tp: int) -> None:
    """The stand-in overrides what 1.2's builder overrides, and the check is exact."""
    assert build(tmp_path, precision=precision, tp=tp).built


def test_flag_that_the_installed_release_lacks(place: Path, fake: pytest.MonkeyPatch) -> None:
    resolved = TrtllmJob.resolve(job(), machine())
    odd = TrtllmJob(resolved.job, resolved.machine, {**resolved.flags, "brand_new": "enable"})
    fake.setattr(TrtllmJob, "resolve", lambda *_: odd)
    with pytest.raises(EngineBuildError, match="does not take --brand_new enable"):
        build(place)


def test_killed_build_resumes(place: Path, fake: pytest.MonkeyPatch) -> None:
    """kill -9 of trtbuild itself while rank 1 is being built."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from tests.engines.tensorrt_llm.test_builder import build; build(Path(sys.argv[2]))"
    )
    root = TESTS.parent
    environment = os.environ | {"FAKE_TRTLLM": "sleep:1", "PYTHONPATH": f"{FAKE}{os.pathsep}{root}"}
    process = subprocess.Popen([sys.executable, "-c", script, str(root), str(place)], env=environment)
    partial = place / "engines" / ".tiny.partial"
    deadline = time.monotonic() + 60
    log = partial / "logs" / "rank1.log"
    while not ((partial / "rank0.engine").is_file() and log.is_file() and "constructing" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    fake.setenv("FAKE_TRTLLM", "crash:0")
    report = build(place)
    assert list(report.passport["builder"]["seconds"]) == ["1"]


@pytest.mark.parametrize(
    ("here", "fields", "message"),
    [
        (machine(None), {}, r"tensorrt_llm is not installed; work in \S+-trtllm-python-py3 \(--dry-run"),
        (machine("0.17.0"), {}, "0.17.0 is older than 1.0"),
        (machine("1.3.0"), {}, "1.3.0 has no engines any more"),
        (machine(tensorrt="10.3.0"), {}, "TensorRT 10.3.0 is installed, and TensorRT-LLM 1.2.1 is made for"),
        (machine(gpus=0), {}, "no GPU"),
        (machine(sm=75), {}, "sm75: TensorRT-LLM 1.x supports sm80 and later"),
        (machine(sm=86), {"precision": "fp8"}, "sm86 has no fp8"),
        (machine(sm=100), {"precision": "int8"}, "sm100: TensorRT-LLM 1.x has no int8"),
        (machine(), {"target": "sm89"}, "--target sm89: the GPU here is sm90"),
        (machine(), {"target": "sm89,sm90"}, "an engine is for one compute capability"),
    ],
)  # fmt: skip
def test_machine_is_checked_before_a_byte(
    tmp_path: Path, here: BuildMachine, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(Refused, match=message):
        build(tmp_path, here, **fields)
    assert not (tmp_path / "build").exists()


def test_other_release_is_another_engine(place: Path, fake: pytest.MonkeyPatch) -> None:
    build(place)
    with pytest.raises(Refused, match=r"release: '1.2.1' -> '1.2.0'"):
        build(place, machine("1.2.0"))


def test_check_after_a_half_written_config(place: Path, fake: pytest.MonkeyPatch) -> None:
    report = build(place)
    config = json.loads((report.directory / "config.json").read_text())
    del config["build_config"]
    (report.directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no 'build_config'"):
        TrtllmEngine.open(report.directory)
