"""`trtbuild migrate` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hand_filled_repository import HandFilled, hand_filled

from trtbuild.cli import main
from trtbuild.engines.recipe import Recipe


def run(*words: object) -> Result:
    return CliRunner().invoke(main, ["migrate", *map(str, words)])


@pytest.fixture
def repo(tmp_path: Path) -> HandFilled:
    return hand_filled(tmp_path / "repo")


def test_recipe_goes_to_stdout_and_findings_to_stderr(repo: HandFilled, tmp_path: Path) -> None:
    result = run(repo.write())
    assert result.exit_code == 0
    (tmp_path / "recipe.toml").write_text(result.stdout, encoding="utf-8")
    assert Recipe.read(tmp_path / "recipe.toml").max_batch_size == 4
    assert "tensorrt_llm_bls         bls" in result.stderr
    assert "0 errors, 0 warnings" in result.stderr


def test_errors_end_with_4(repo: HandFilled, tmp_path: Path) -> None:
    repo.models["tensorrt_llm"].parameters["max_beam_width"] = "4"
    result = run(repo.write(), "-o", tmp_path / "recipe.toml")
    assert result.exit_code == 4
    assert "error tensorrt_llm/config.pbtxt:" in result.stdout
    assert "max_beam_width: found 4; allowed: at most the engine's 1" in result.stdout
    assert "1 error, 0 warnings" in result.stdout
    assert "1 error, with its fix above" in result.stderr
    assert f"recipe of tensorrt_llm: {tmp_path / 'recipe.toml'}" in result.stdout
    # The engine is what it is, whatever the repository says.
    assert Recipe.read(tmp_path / "recipe.toml").layout.world_size == 1


def test_json_has_every_field(repo: HandFilled) -> None:
    repo.models["tensorrt_llm"].parameters["max_beam_width"] = "4"
    result = run(repo.write(), "--json")
    assert result.exit_code == 4
    found = json.loads(result.stdout)
    assert found["release"] == "1.2.1"
    assert found["counts"]["error"] == 1
    first = found["findings"][0]
    assert set(first) == {"severity", "check", "file", "key", "found", "allowed", "fix", "line"}
    assert (first["severity"], first["key"], first["found"]) == ("error", "max_beam_width", "4")
    [engine] = found["engines"]
    assert engine["recipe"]["max_seq_len"] == 256
    assert engine["package_options"]["kv_cache_free_gpu_mem_fraction"] == "0.85"


def test_a_file_that_is_there_is_kept(repo: HandFilled, tmp_path: Path) -> None:
    output = tmp_path / "recipe.toml"
    output.write_text("mine", encoding="utf-8")
    assert run(repo.write(), "-o", output).exit_code == 3
    assert output.read_text(encoding="utf-8") == "mine"
    assert run(repo.root, "-o", output, "--force").exit_code == 0
    assert Recipe.read(output).builder == "tensorrt-llm"


def test_several_engines_want_a_name(repo: HandFilled, tmp_path: Path) -> None:
    repo.models["draft"] = hand_filled(tmp_path / "other" / "repo").models["tensorrt_llm"]
    root = repo.write()
    result = run(root)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "--model says whose recipe is wanted (draft, tensorrt_llm)" in result.stderr
    assert run(root, "-o", tmp_path / "recipe.toml").exit_code == 3
    chosen = run(root, "--model", "draft")
    assert chosen.exit_code == 0
    assert "What draft of the old repository" in chosen.stdout
    assert run(root, "--model", "big").exit_code == 3


@pytest.mark.parametrize(("as_json", "with_output"), [(False, True), (True, True), (False, False)])
def test_without_an_engine_it_says_why_there_is_no_recipe(
    as_json: bool, with_output: bool, repo: HandFilled, tmp_path: Path
) -> None:
    (repo.engine / "config.json").unlink()
    output = tmp_path / "recipe.toml"
    result = run(repo.write(), *(["-o", output] if with_output else []), *(["--json"] if as_json else []))
    assert result.exit_code == 4
    assert not output.exists()
    where = f", and {output} is not written" if with_output else ""
    stream = result.stdout if with_output and not as_json else result.stderr
    assert f"no recipe{where}: a recipe is read from an engine's config.json" in stream
    if as_json:
        assert json.loads(result.stdout)["engines"] == []


def test_force_is_about_the_file() -> None:
    assert "Replace the file of -o." in run("--help").stdout


def test_nothing_in_the_repository_is_changed(repo: HandFilled) -> None:
    root = repo.write()
    before = {path: path.read_bytes() for path in sorted(root.parent.rglob("*")) if path.is_file()}
    assert run(root).exit_code == 0
    assert {path: path.read_bytes() for path in sorted(root.parent.rglob("*")) if path.is_file()} == before


def test_wrong_usage(repo: HandFilled) -> None:
    assert run(repo.write(), "--release", "1.2.1", "--container", "26.05").exit_code == 2
    assert run(repo.root.parent / "nothing").exit_code == 3
