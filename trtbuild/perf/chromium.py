"""A page opened in headless Chromium: what its scripts made of it, and what they complained about."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import TrtBuildError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing is looked up in a network; --no-sandbox because containers run as root, over pages that we wrote ourselves.
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--enable-logging=stderr", "--virtual-time-budget=60000",
)  # fmt: skip
_CONSOLE = re.compile(r":CONSOLE[:(]\d+\)?\] (.*)")


@dataclass(frozen=True)
class Opened:
    """`html` is the document after its scripts ran; `console` holds every line that they wrote there."""

    html: str
    console: list[str]


def find_chromium() -> Path | None:
    """On PATH."""
    return next((Path(found) for name in NAMES if (found := shutil.which(name))), None)


def open_page(binary: Path, page: Path, *, fragment: str = "", timeout_s: float = 120.0) -> Opened:
    """Load `page` and wait for its scripts; raises `TrtBuildError` where Chromium fails or takes longer."""
    url = page.absolute().as_uri() + (f"#{fragment}" if fragment else "")
    done = _run(binary, ["--dump-dom", url], timeout_s)
    return Opened(done.stdout, _CONSOLE.findall(done.stderr))


def screenshot(
    binary: Path, page: Path, file: Path, *, width: int, height: int, dark: bool = False, timeout_s: float = 120.0
) -> list[str]:
    """A PNG of the page's first `height` pixels, in light or dark; the lines of its console."""
    # Blink's PreferredColorScheme: 0 is dark, 1 light.
    options = [f"--screenshot={file.absolute()}", f"--window-size={width},{height}"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    return _CONSOLE.findall(_run(binary, [*options, page.absolute().as_uri()], timeout_s).stderr)


def _run(binary: Path, arguments: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="trtbuild-chromium-") as profile:
        command = [str(binary), *_FLAGS, f"--user-data-dir={profile}", *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise TrtBuildError(f"{binary} did not finish within {timeout_s:g} s") from error
        except OSError as error:
            raise TrtBuildError(f"{binary}: {error.strerror}") from error
    if done.returncode:
        raise TrtBuildError(f"{binary} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return done
