"""`trtbuild list` counts what is on disk; `trtbuild prune` removes what can go, and nothing else."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from trtbuild.cli import main
from trtbuild.errors import Refused
from trtbuild.inventory import disk_bytes, freed_bytes, inventory, prune
from trtbuild.workspace import Workspace, staged, write_json

MODEL = {"architecture": "MixtralForCausalLM", "moe": {"num_experts": 8}}
LAYOUT = {"tp": 2, "pp": 1, "moe_tp": 1, "moe_ep": 2}
WEIGHTS = 100_000


def make(workspace: Workspace, name: str) -> None:
    """A rank checkpoint and its engine, sharing one file of weights as `compile` leaves them."""
    common = {"model": MODEL, "layout": LAYOUT, "precision": {"weights": "fp8"}}
    with staged(workspace.build / name, {"for": name}) as directory:
        assert directory is not None
        (directory / "rank0.safetensors").write_bytes(os.urandom(WEIGHTS))
        write_json(directory / "trtbuild.json", common)
    with staged(workspace.engines / name, {"for": name}) as directory:
        assert directory is not None
        os.link(workspace.build / name / "rank0.safetensors", directory / "rank0.safetensors")
        facts = {"builder": {"name": "tensorrt-rtx", "version": "1.7"}, "created": "2026-11-22T10:00:00Z"}
        write_json(directory / "engine.json", {**common, **facts, "digests": {"weights": "x"}})


def abandon(workspace: Workspace, name: str) -> Path:
    """What a killed compile leaves."""
    with pytest.raises(RuntimeError), staged(workspace.engines / name, {"for": name}) as directory:
        assert directory is not None
        (directory / "plan").write_bytes(b"x" * 5000)
        raise RuntimeError
    return workspace.engines / f".{name}.partial"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path)
    make(made, "a-fp8-tp2")
    (made.build / "README.md").write_text("what lands here")
    (made.build / "notes").mkdir()
    return made


def test_list_counts_shared_weights_once(workspace: Workspace) -> None:
    build, engine = inventory(workspace)
    assert [(i.stage, i.name, i.state, i.busy) for i in (build, engine)] == [
        ("build", "a-fp8-tp2", "complete", False), ("engines", "a-fp8-tp2", "complete", False),
    ]  # fmt: skip
    assert (
        engine.about
        == "MixtralForCausalLM, fp8, tp 2 pp 1 moe-tp 1 moe-ep 2, tensorrt-rtx 1.7, 2026-11-22, not verified"
    )
    assert build.bytes > WEIGHTS > build.frees
    assert engine.bytes > WEIGHTS > engine.frees
    both = disk_bytes([build.path, engine.path])
    assert WEIGHTS < both < 1.5 * WEIGHTS
    assert freed_bytes([build, engine]) == both


def test_prune_removes_only_what_killed_commands_left(workspace: Workspace) -> None:
    partial = abandon(workspace, "b-int4-tp1")
    old = workspace.build / ".a-fp8-tp2.old"
    old.mkdir()
    assert {i.path for i in prune(workspace, dry_run=True)} == {partial, old}
    assert partial.exists()
    assert {(i.path, i.state) for i in prune(workspace)} == {(partial, "unfinished"), (old, "leftover")}
    assert not partial.exists() and not old.exists()
    assert len(inventory(workspace)) == 2
    assert (workspace.build / "notes").is_dir()


def test_prune_leaves_what_a_command_holds(workspace: Workspace) -> None:
    with staged(workspace.engines / "c", {"for": "c"}) as directory:
        assert directory is not None
        assert [i.busy for i in inventory(workspace) if i.name == "c"] == [True]
        assert prune(workspace) == []
        assert directory.exists()
        with pytest.raises(Refused, match="being written"):
            prune(workspace, ["c"])


def test_rank_checkpoints_of_engines_can_go(workspace: Workspace) -> None:
    make(workspace, "only-converted")
    prune(workspace, ["only-converted"])
    with staged(workspace.build / "only-converted", {"x": 1}) as directory:
        assert directory is not None
        write_json(directory / "trtbuild.json", {"model": MODEL, "layout": LAYOUT, "precision": {"weights": "fp8"}})
    removed = prune(workspace, rank_checkpoints=True)
    assert [(i.stage, i.name) for i in removed] == [("build", "a-fp8-tp2")]
    assert (workspace.engines / "a-fp8-tp2" / "rank0.safetensors").stat().st_size == WEIGHTS
    assert (workspace.build / "only-converted").is_dir()


def test_named_results_go_from_both_stages(workspace: Workspace) -> None:
    make(workspace, "b")
    with pytest.raises(Refused, match="nor in triton_repo/; there: a-fp8-tp2, b"):
        prune(workspace, ["a-fp8-tp2", "missing"])
    assert len(inventory(workspace)) == 4
    prune(workspace, ["a-fp8-tp2"])
    assert {i.name for i in inventory(workspace)} == {"b"}


@pytest.mark.parametrize("damage", ["{", "[]", '{"layout": 3}'])
def test_a_damaged_result_is_listed(workspace: Workspace, damage: str) -> None:
    (workspace.engines / "a-fp8-tp2" / "engine.json").write_text(damage)
    item = inventory(workspace)[1]
    assert item.state == "unreadable"
    assert item.about.startswith("engine.json")
    assert prune(workspace) == []


def test_commands(workspace: Workspace) -> None:
    run = CliRunner()
    shown = run.invoke(main, ["list", "--workspace", str(workspace.root)])
    assert shown.exit_code == 0 and "2 in all" in shown.output and "complete" in shown.output
    listed = json.loads(run.invoke(main, ["list", "--json", "--workspace", str(workspace.root)]).output)
    assert [item["stage"] for item in listed] == ["build", "engines"]
    done = run.invoke(main, ["prune", "a-fp8-tp2", "--json", "--workspace", str(workspace.root)])
    assert json.loads(done.output)["freed"] > WEIGHTS
    assert inventory(workspace) == []
    assert run.invoke(main, ["prune", "--workspace", str(workspace.root)]).output == "nothing to remove\n"
    assert run.invoke(main, ["prune", "../x", "--workspace", str(workspace.root)]).exit_code == 3


def test_check_names_a_flipped_bit(tmp_path: Path) -> None:
    """In the middle of a tensor, where neither header nor length shows it; in the engine it is the same file."""
    run = CliRunner()
    place = ["--workspace", str(tmp_path)]
    options = ["--target", "sm89", "--max-batch-size", "1", "--max-seq-len", "64", "--name", "x"]
    assert run.invoke(main, ["compile", "tiny-qwen2", *options, *place]).exit_code == 0
    good = run.invoke(main, ["list", "--check", *place])
    assert good.exit_code == 0, good.output
    assert good.output.count("content as written") == 2
    file = tmp_path / "build" / "x" / "rank0.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        [byte] = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 4]))
    bad = run.invoke(main, ["list", "--check", "--json", *place])
    assert bad.exit_code == 4
    assert ["transformer." in check["problem"] for check in json.loads(bad.stdout)] == [True, True]


def test_a_package_is_listed_and_pruned_with_its_engine(workspace: Workspace) -> None:
    for model in ("a-fp8-tp2", "a-fp8-tp2-unary", "ensemble"):
        write_json_in(workspace.models / model, {"engine": "a-fp8-tp2"})
    (workspace.models / "somebody-elses" / "1").mkdir(parents=True)
    left = workspace.packages_staging / "b-int4-tp1"
    left.mkdir(parents=True)
    (left / "part").write_bytes(b"x" * 7000)
    os.link(workspace.build / "a-fp8-tp2" / "rank0.safetensors", workspace.models / "a-fp8-tp2" / "rank0.safetensors")
    packages = [item for item in inventory(workspace) if item.stage == "triton_repo"]
    assert [(i.name, i.state, i.about) for i in packages] == [
        ("a-fp8-tp2", "complete", "Triton model a-fp8-tp2"),
        ("a-fp8-tp2", "complete", "Triton model a-fp8-tp2-unary"),
        ("a-fp8-tp2", "complete", "Triton model ensemble"),
        ("b-int4-tp1", "leftover", ""),
    ]
    assert packages[0].frees < 1000, "its weights are the engine's"
    removed = prune(workspace)
    assert [(item.name, item.frees) for item in removed] == [("b-int4-tp1", 7000)]
    prune(workspace, ["a-fp8-tp2"])
    assert [path.name for path in workspace.models.iterdir()] == ["somebody-elses"]
    assert not workspace.engines.joinpath("a-fp8-tp2").exists()
    assert not list(workspace.packages_staging.iterdir())


def write_json_in(directory: Path, value: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    write_json(directory / "trtbuild.json", value)
