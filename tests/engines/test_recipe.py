"""Recipes: every field checked at once, flags over the file, names, and the command that asks for the same."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from trtbuild.checkpoints.layout import Layout
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import Refused


def test_file_with_flags_on_top(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "text.txt").write_text("x")
    file = tmp_path / "r.toml"
    file.write_text(
        'model = "./hf"\nprecision = "fp8"\ntp = 4\nmoe_ep = 2\ncalib_data = "./text.txt"\ntarget = ["sm89", "sm120"]\n'
    )
    recipe = Recipe.read(file, tp=2, name="mine")
    assert recipe.model == str(tmp_path / "hf")
    assert recipe.calib_data == tmp_path / "text.txt"
    assert (recipe.precision, recipe.tp, recipe.target, recipe.name) == ("fp8", 2, ("sm89", "sm120"), "mine")
    assert recipe.layout == Layout(2, 1, 1, 2)


def test_a_model_that_is_no_file_beside_the_recipe_stays_a_name(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('model = "mistralai/Mixtral-8x7B-v0.1"\n')
    assert Recipe.read(file).model == "mistralai/Mixtral-8x7B-v0.1"


@pytest.mark.parametrize("content", [b"model = ", b"\xff\xfe", b"model = 'a'\nmodel = 'b'"])
def test_a_file_that_is_no_toml(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(Refused, match=r"recipe .*r\.toml: "):
        Recipe.read(tmp_path / "r.toml")
    with pytest.raises(Refused, match=r"recipe .*gone\.toml: .*No such file"):
        Recipe.read(tmp_path / "gone.toml")


def test_every_wrong_field_is_listed() -> None:
    with pytest.raises(Refused) as refusal:
        Recipe.create(precision="fp4", tp=0, kv_cache="int3", colour="red", builder="onnx", max_seq_len=1)
    assert refusal.value.exit_code == 3
    for part in ("model: Field required", "precision: ", "'fp4'", "'fp8'", "tp: ", "found 0", "kv_cache: ", "colour: ",
                 "builder: ", "'tensorrt-rtx'", "max_seq_len: "):  # fmt: skip
        assert part in refusal.value.message


@pytest.mark.parametrize(("fields", "name"), [
    ({"model": "mixtral"}, "mixtral-bf16-tp1"),
    ({"model": "mixtral-8x7b", "precision": "fp8", "tp": 2, "moe_ep": 2}, "mixtral-8x7b-fp8-tp2-ep2"),
    ({"model": "Qwen/Qwen2.5-0.5B", "precision": "int4", "tp": 4, "pp": 2}, "qwen2.5-0.5b-int4-tp4-pp2"),
    ({"model": "/data/Some-Model/", "builder": "tensorrt-llm"}, "some-model-bf16-tp1-trtllm"),
    ({"model": "x", "tp": 8, "moe_tp": 2, "pp": 3, "builder": "tensorrt-llm"}, "x-bf16-tp8-ep4-pp3-trtllm"),
    ({"model": "x", "name": "Chosen.1"}, "Chosen.1"),
])  # fmt: skip
def test_names(fields: dict[str, Any], name: str) -> None:
    assert Recipe.create(**fields).engine_name == name


@pytest.mark.parametrize(
    "fields", [{"model": "x", "name": "../x"}, {"model": "x", "name": "a b"}, {"model": "my model"}]
)
def test_a_name_that_is_no_file_name_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="use letters, digits"):
        _ = Recipe.create(**fields).engine_name


def test_sizes_that_do_not_multiply_are_refused_with_the_flags() -> None:
    with pytest.raises(Refused, match="--moe-tp 2 x --moe-ep 2 is 4, but must equal --tp 2"):
        _ = Recipe.create(model="x", tp=2, moe_tp=2, moe_ep=2).layout


def test_the_command_says_what_differs_from_the_defaults() -> None:
    assert Recipe.create(model="mixtral").command() == "trtbuild compile mixtral"
    fields = {
        "model": "my dir/model",
        "precision": "fp8",
        "tp": 2,
        "target": ("sm89", "sm120"),
        "embed_weights": True,
        "max_seq_len": 512,
    }
    words = shlex.split(Recipe.create(**fields).command())
    assert words[:3] == ["trtbuild", "compile", "my dir/model"]
    assert words[3:] == [
        "--precision",
        "fp8",
        "--tp",
        "2",
        "--target",
        "sm89,sm120",
        "--max-seq-len",
        "512",
        "--embed-weights",
    ]


def test_the_command_is_one_that_the_command_line_takes() -> None:
    """Each field is a flag of `compile`, and asking with them is asking for the same recipe."""
    from trtbuild import cli

    compile_flags = {flag for parameter in cli.main.commands["compile"].params for flag in parameter.opts}  # type: ignore[attr-defined]
    flags = {"--" + field.replace("_", "-") for field in Recipe.model_fields} - {"--model"}
    assert flags <= compile_flags, flags - compile_flags


def test_a_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe.create(model="x").tp = 2  # type: ignore[misc]
