"""triton_repo/compose.yaml and the Dockerfile: valid, safe by default, and true to what `trtbuild serve` takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from click.testing import CliRunner

from trtbuild import __version__
from trtbuild.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "triton_repo" / "compose.yaml"
DOCKERFILE = (ROOT / "triton_repo" / "Dockerfile").read_text()


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def check(compose: dict[str, Any]) -> None:
    """Against the Compose specification's schema, which check-jsonschema carries."""
    jsonschema.validate(compose, get_builtin_schema("vendor.compose-spec"))


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.startswith(f"{name} ")]


def seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)(s|m)", text)
    assert found
    return int(found[1]) * {"s": 1, "m": 60}[found[2]]


def test_compose_is_valid(compose: dict[str, Any]) -> None:
    check(compose)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["services", "serve", "shm_size"], ["2gb"]),
        (["services", "serve", "stop_grace"], "90s"),
        (["services", "serve", "healthcheck", "tests"], []),
        (["services", "serve", "deploy", "resources", "reservations", "devices", 0, "gpus"], 1),
        (["configs", "prometheus", "contents"], ""),
    ],
)
def test_a_broken_compose_is_not_valid(compose: dict[str, Any], path: list[Any], value: object) -> None:
    place: Any = compose
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(compose)


def test_nobody_outside_reaches_it_by_default(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service["ports"]]
    assert len(ports) == 5
    assert all(port.startswith("${TRTBUILD_BIND:-127.0.0.1}:") for port in ports)


def test_the_repository_is_read_only_and_the_service_has_gpus(compose: dict[str, Any]) -> None:
    serve = compose["services"]["serve"]
    (models,) = (volume for volume in serve["volumes"] if isinstance(volume, dict))
    assert models["target"] == "/models"
    assert models["read_only"] is True
    (gpus,) = serve["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}


def test_it_is_given_time_to_drain(compose: dict[str, Any]) -> None:
    serve = compose["services"]["serve"]
    (exit_timeout,) = (flag.partition("=")[2] for flag in serve["command"] if flag.startswith("--exit-timeout"))
    assert seconds(serve["stop_grace_period"]) >= int(exit_timeout) + 15


def test_prometheus_scrapes_the_ports_that_serve_listens_on(compose: dict[str, Any]) -> None:
    scraped = yaml.safe_load(compose["configs"]["prometheus"]["content"])["scrape_configs"]
    targets = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    assert targets == {"serve:8002", "serve:9000"}
    assert compose["services"]["prometheus"]["configs"][0]["source"] == "prometheus"


@pytest.mark.parametrize("where", ["compose", "image"])
def test_serve_takes_the_command(compose: dict[str, Any], where: str) -> None:
    """Up to the repository, which is not there: an unknown option ends with click's 2."""
    command = compose["services"]["serve"]["command"] if where == "compose" else json.loads(instructions("CMD")[0])
    found = CliRunner().invoke(main, [*command, "--tritonserver", "/bin/true"])
    assert found.exit_code == 3
    assert "/models" in found.output


def test_the_image_is_of_this_version_and_has_what_pyproject_offers(compose: dict[str, Any]) -> None:
    assert compose["services"]["serve"]["image"] == f"trtbuild:{__version__}"
    assert f"-t trtbuild:{__version__} " in DOCKERFILE
    arguments = dict(argument.split("=", 1) for argument in instructions("ARG"))
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("-dependencies]")[2], re.MULTILINE
    )
    assert set(arguments["EXTRAS"].split(",")) <= set(extras)


def test_the_image_copies_only_what_its_context_lets_through() -> None:
    ignore = (ROOT / "triton_repo" / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {source for line in instructions("COPY") for source in line.split()[:-1]}
    assert "*" in ignore
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_is_not_run_as_root_and_passes_signals() -> None:
    assert instructions("USER")[-1] == "1000:1000"
    entry = json.loads(instructions("ENTRYPOINT")[0])
    # tini -g would signal Triton too, which `serve` stops in order.
    assert (entry[0], entry[1], entry[-1]) == ("tini", "--", "trtbuild")
    assert {"8000", "8001", "8002", "9000"} == set(instructions("EXPOSE")[0].split())


def test_git_keeps_what_deploys() -> None:
    ignore = (ROOT / ".gitignore").read_text().splitlines()
    assert {f"!/triton_repo/{name}" for name in ("compose.yaml", "Dockerfile", "Dockerfile.dockerignore")} <= set(
        ignore
    )
