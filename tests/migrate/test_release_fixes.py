"""What is proposed for an engine of another release: builds and containers that there are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hand_filled_repository import hand_filled
from repository_changes import findings_of


@pytest.mark.parametrize(
    ("asked", "said", "unsaid"),
    [
        ({"release": "1.1.0"}, ["build the engine again with 1.1.0"], ["--llmapi"]),
        (
            {"release": "1.3.0"},
            ["26.07-trtllm-python-py3", "trtbuild package --llmapi", "export NAME --scheme modelopt", "1.3.0 has none"],
            ["build the engine again"],
        ),
        (
            {"container": "25.04"},
            ["serve it in nvcr.io/nvidia/tritonserver:26.07-", "engines of 1.0 to 1.2, not of 0.18.2"],
            ["build the engine again", "--llmapi"],
        ),
    ],
)
def test_a_release_that_cannot_be_built_for_is_not_proposed(
    asked: dict[str, str], said: list[str], unsaid: list[str], tmp_path: Path
) -> None:
    found = findings_of(hand_filled(tmp_path / "repo"), None, **asked)
    [finding] = [f for f in found if f.check == "version"]
    assert not [text for text in said if text not in finding.fix], finding.fix
    assert not [text for text in unsaid if text in finding.fix], finding.fix


def test_an_old_engine_is_built_again_in_a_newer_container(tmp_path: Path) -> None:
    """Where neither its own release nor the one that serves is one that trtbuild builds for."""
    found = findings_of(hand_filled(tmp_path / "repo", "0.17.0"), None, container="25.04")
    [finding] = [f for f in found if f.check == "version"]
    assert ":25.02-trtllm-python-py3, or build the engine again in a newer container" in finding.fix
    assert ":26.07-trtllm-python-py3: trtbuild builds engines of 1.0 to 1.2, not of 0.18.2" in finding.fix
