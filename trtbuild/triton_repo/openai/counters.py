"""The front end's own counters, as a page of Prometheus metrics, and whether it is stopping."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field


@dataclass
class ServerState:
    """Shared by the gate, the routes and the shutdown; one event loop, so without locks."""

    stopping: bool = False
    num_active: int = 0
    """Requests of /v1 that are not answered yet."""
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    """By (path, status)."""
    num_disconnected: int = 0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By path."""

    def finish(self, path: str, status: int | None, seconds: float) -> None:
        """Count one request; no status: its client left before there was one."""
        if status is None:
            self.num_disconnected += 1
            return
        self.answered[path, status] += 1
        self.seconds[path] += seconds

    def to_prometheus(self) -> str:
        lines = [
            "# TYPE trtbuild_openai_requests_active gauge",
            f"trtbuild_openai_requests_active {self.num_active}",
            "# TYPE trtbuild_openai_disconnected_total counter",
            f"trtbuild_openai_disconnected_total {self.num_disconnected}",
            "# TYPE trtbuild_openai_requests_total counter",
        ]
        for (path, status), count in sorted(self.answered.items()):
            lines.append(f'trtbuild_openai_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE trtbuild_openai_request_seconds_total counter")
        for path, seconds in sorted(self.seconds.items()):
            lines.append(f'trtbuild_openai_request_seconds_total{{path="{path}"}} {seconds:.6f}')
        return "\n".join(lines) + "\n"
