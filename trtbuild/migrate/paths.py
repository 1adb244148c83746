"""Where a path of the serving container is on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from trtbuild.errors import Refused


@dataclass(frozen=True)
class Places:
    """The repository, and CONTAINER=HERE pairs that the user gave, longest first."""

    repository: Path
    mounts: tuple[tuple[PurePosixPath, Path], ...] = ()

    @classmethod
    def create(cls, repository: Path, mounts: Iterable[str]) -> Places:
        """Raises `Refused` on one that is no CONTAINER=HERE."""
        pairs = []
        for mount in mounts:
            inside, separator, here = mount.partition("=")
            if not separator or not inside.startswith("/") or not Path(here).is_dir():
                raise Refused(f"--mount {mount}: must be CONTAINER=HERE, an absolute path and a directory that is here")
            pairs.append((PurePosixPath(inside), Path(here)))
        return cls(repository, tuple(sorted(pairs, key=lambda pair: -len(pair[0].parts))))

    def find(self, text: str, beside: Path | None = None) -> Path | None:
        """The directory: through a mount, as it stands, or inside the repository, whatever that is mounted as.

        `beside`: where a relative one may begin, as in the models that `trtbuild package` writes.
        """
        if "\0" in text or len(text) > 4096:
            return None
        inside = PurePosixPath(text)
        for mount, here in self.mounts:
            if inside.is_relative_to(mount):
                found = here / inside.relative_to(mount)
                return found if _is_directory(found) else None
        starts = (Path(), *([beside] if beside is not None and not inside.is_absolute() else []))
        for start in starts:
            if _is_directory(start / text):
                return start / text
        for begin in range(1, len(inside.parts) - 1):
            found = self.repository.joinpath(*inside.parts[begin:])
            if ".." not in inside.parts and _is_directory(found):
                return found
        return None


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False
