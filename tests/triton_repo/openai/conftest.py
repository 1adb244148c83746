"""One fake Triton and one front end for each test file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_triton import FakeTriton
from front_end import FrontEndProcess


@pytest.fixture(scope="module")
def triton() -> Iterator[FakeTriton]:
    fake = FakeTriton()
    fake.start()
    yield fake
    fake.stop()


@pytest.fixture(autouse=True)
def _fresh(triton: FakeTriton) -> Iterator[None]:
    """Every test begins with the default script, and leaves no request behind."""
    triton.script, triton.ready_models, triton.server_ready = FakeTriton.script, set(FakeTriton().ready_models), True
    triton.seen.clear()
    yield
    triton.wait_idle()


@pytest.fixture(scope="module")
def server(triton: FakeTriton, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontEndProcess]:
    """A front end with all defaults."""
    log_path: Path = tmp_path_factory.mktemp("front_end") / "log"
    front_end = FrontEndProcess(triton.port, log_path)
    yield front_end
    assert front_end.stop() == 0, log_path.read_text()
    assert "Traceback" not in log_path.read_text()
