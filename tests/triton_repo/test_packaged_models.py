"""What a name given to `serve` means, and what `serve` refuses before it starts anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from trtllm_engine import make_trtllm_engine

from trtbuild.cli import main
from trtbuild.errors import Refused
from trtbuild.triton_repo.installation import PATHS_VARIABLE, TritonInstallation
from trtbuild.triton_repo.packaged_models import check_llmapi, resolve_names
from trtbuild.workspace import PACKAGE_RECORD, Workspace, write_json

ROLES = ("ensemble", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")


def put(repository: Path, engine: str, models: list[str], **record: str) -> None:
    for model in models:
        (repository / model).mkdir(parents=True)
        (repository / model / "config.pbtxt").write_text(f'name: "{model}"\nbackend: "python"\n')
        if engine:
            write_json(repository / model / PACKAGE_RECORD, {"engine": engine, "models": models, **record})


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    put(tmp_path, "one", list(ROLES))
    put(tmp_path, "two", [f"b_{role}" for role in ROLES])
    put(tmp_path, "own", ["own", "own-tokens", "own-unary", "alias"])
    put(tmp_path, "", ["theirs"])
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", list(ROLES)),
        ("tensorrt_llm", list(ROLES)),
        ("ensemble", list(ROLES)),
        ("two", [f"b_{role}" for role in ROLES]),
        ("b", [f"b_{role}" for role in ROLES]),
        ("b_tensorrt_llm", [f"b_{role}" for role in ROLES]),
        ("own", ["alias", "own", "own-tokens", "own-unary"]),
        ("own-unary", ["own-unary"]),
        ("theirs", ["theirs"]),
    ],
)
def test_engines_prefixes_and_models_are_names(name: str, expected: list[str], repository: Path) -> None:
    assert resolve_names(repository, [name]) == expected


def test_an_unknown_name_is_told_the_engines_not_their_models(repository: Path) -> None:
    with pytest.raises(Refused) as refused:
        resolve_names(repository, ["nobody", "one"])
    listed = refused.value.message.partition("; there: ")[2].split(", ")
    assert sorted(listed) == ["one", "own", "theirs", "two (as b_...)"]
    assert resolve_names(repository, ["own-unary", "two"]) == [*(f"b_{role}" for role in ROLES), "own-unary"]


def test_models_of_the_llm_api_are_served_where_it_is(tmp_path: Path) -> None:
    put(tmp_path, "chat", ["chat"], kind="llmapi")
    put(tmp_path, "own", ["own"])
    here = TritonInstallation(Path("tritonserver"), "PATH")
    check_llmapi(tmp_path, ["own"], here)
    with pytest.raises(Refused, match=r"chat run over TensorRT-LLM's LLM API, .*container with TensorRT-LLM 1\.3"):
        check_llmapi(tmp_path, ["chat", "own"], here)
    (tmp_path / "packages" / "tensorrt_llm").mkdir(parents=True)
    (tmp_path / "packages" / "tensorrt_llm" / "__init__.py").touch()
    there = TritonInstallation(Path("t"), "PATH", environment={PATHS_VARIABLE: str(tmp_path / "packages")})
    check_llmapi(tmp_path, ["chat", "own"], there)


def test_serve_refuses_the_llm_api_before_triton_starts(tmp_path: Path) -> None:
    put(tmp_path / "models", "chat", ["chat"], kind="llmapi")
    result = CliRunner().invoke(
        main, ["serve", "--repository", str(tmp_path / "models"), "--tritonserver", "/bin/true"]
    )
    assert (result.exit_code, "finds no tensorrt_llm here" in result.output) == (3, True), result.output


@pytest.mark.parametrize("service", ["grpc", "metrics", "openai"])
def test_services_do_not_share_a_port(service: str, repository: Path) -> None:
    ports = ["--http-port", "8100", f"--{service}-port", "8100", "--tritonserver", "/bin/true"]
    result = CliRunner().invoke(main, ["serve", "own", "--repository", str(repository), *ports])
    assert result.exit_code == 3
    assert f"--http-port and --{service}-port are both 8100" in result.output


def test_an_engines_name_serves_its_package(tmp_path: Path) -> None:
    """From `package` with a prefix to the command that `serve` prints: all five on rank 0."""
    place = Workspace(tmp_path)
    make_trtllm_engine(place.engines / "tiny")
    flags = ["--workspace", str(tmp_path)]
    packaged = CliRunner().invoke(main, ["package", "tiny", "--prefix", "b", "--no-check", *flags])
    assert packaged.exit_code == 0, packaged.output
    found = [CliRunner().invoke(main, ["serve", name, "--dry-run", *flags]) for name in ("tiny", "b", "b_tensorrt_llm")]
    assert {one.exit_code for one in found} == {0}, found[0].output
    assert len({one.stdout for one in found}) == 1
    assert all(f"--load-model=b_{role}" in found[0].stdout for role in ROLES)
