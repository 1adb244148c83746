"""What the front end was started with."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import Refused

DEFAULT_MAX_REQUEST_BYTES = 8 << 20
DEFAULT_REQUEST_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Settings:
    """Times are seconds."""

    triton: str = "127.0.0.1:8001"
    metrics_url: str | None = None
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    body_timeout_s: float = 30.0
    """From a request's headers to the end of its body."""
    header_timeout_s: float = 15.0
    """From a connection's opening to the end of its first request's headers."""
    request_timeout_s: float = DEFAULT_REQUEST_TIMEOUT_S
    """From the request to the end of the answer."""
    exit_timeout_s: float = 30.0
    key_digests: tuple[bytes, ...] = ()
    """SHA-256 of the keys that are let in; empty: everybody is."""

    def allows(self, key: bytes | None) -> bool:
        """Compares in constant time with every key; digests, so that not even lengths can be told."""
        if not self.key_digests:
            return True
        given = digest_of(key or b"")
        matches = [hmac.compare_digest(given, known) for known in self.key_digests]
        return key is not None and any(matches)


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_keys(path: Path) -> tuple[bytes, ...]:
    """Digests of a file's keys, one a line; blank lines and those that begin with # are left out. Raises `Refused`."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--api-key-file {path}: cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise Refused(
            f"--api-key-file {path}: has no key; write one a line, or leave the option out to let everybody in"
        )
    return tuple(digest_of(key.encode()) for key in keys)
