"""What TensorRT-RTX compiled just in time for a GPU, kept on disk: without it every start compiles every kernel again.

One file for each GPU model, driver, library version and rank. TensorRT-RTX validates its contents against the machine
and refuses what does not fit, so a stale file costs time and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from trtbuild.engines.device.gpu import Gpu
from trtbuild.workspace import write_atomic

log = logging.getLogger("trtbuild.tensorrt")

CACHE_DIRECTORY = "runtime_cache"


class RuntimeCache:
    """One IRuntimeCache, shared by all contexts of a process; must outlive them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.was_loaded = False
        self._cache: Any = None
        self._saved_bytes = 0

    def attach(self, config: Any) -> None:
        """Have contexts made from `config` use the cache; the first one reads the file."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._read()
        if not config.set_runtime_cache(self._cache):
            log.warning("TensorRT-RTX did not take the runtime cache; kernels are compiled at every start")

    def save(self) -> int:
        """Write the cache where it grew since it was read; the bytes of the file.

        A file that cannot be written costs the next start its time, not this one its life.
        """
        if self._cache is None:
            return 0
        content = bytes(memoryview(self._cache.serialize()))
        if len(content) != self._saved_bytes:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(self.path, content)
            except OSError as error:
                log.warning("the runtime cache %s cannot be written: %s", self.path, error.strerror)
                return 0
            self._saved_bytes = len(content)
        return self._saved_bytes

    def _read(self) -> None:
        try:
            content = self.path.read_bytes()
        except OSError:
            return
        self.was_loaded = bool(self._cache.deserialize(content))
        self._saved_bytes = len(content) if self.was_loaded else 0
        if not self.was_loaded:
            log.warning("%s was made on another machine or is damaged; its kernels are compiled again", self.path.name)


def cache_path(engine_dir: Path, engine_id: str, gpu: Gpu, library_version: str, rank: int) -> Path:
    """Beside the plans; for an engine that may not be written to, in the user's cache directory.

    engine_id tells engines apart there: the same NAME can be another engine in another workspace.
    """
    file = f"{_slug(gpu.name)}-{gpu.target}-driver{_slug(gpu.driver)}-{_slug(library_version)}-rank{rank}.cache"
    if os.access(engine_dir, os.W_OK):
        return engine_dir / CACHE_DIRECTORY / file
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    return home / "trtbuild" / CACHE_DIRECTORY / f"{engine_dir.name}-{digest}" / file


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")
