"""The thread that owns the scheduler: takes commands from other threads, steps, hands events on."""

from __future__ import annotations

import queue
from collections.abc import Callable

from trtbuild.engines.serving.request import TokenEvent
from trtbuild.engines.serving.scheduler import Scheduler

Command = Callable[[Scheduler], object]


class EngineLoop:
    """Runs `scheduler` in the thread that calls `run`; `deliver` gets each step's events there."""

    def __init__(self, scheduler: Scheduler, deliver: Callable[[list[TokenEvent]], None]) -> None:
        self._scheduler = scheduler
        self._deliver = deliver
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()

    def post(self, command: Command) -> None:
        """Have the loop call `command` with the scheduler before its next step. From any thread."""
        self._commands.put(command)

    def stop(self) -> None:
        """End `run` after the commands posted so far, whatever is still in flight. From any thread."""
        self._commands.put(None)

    def run(self) -> None:
        """Until `stop`; an exception of the executor ends it and reaches the caller."""
        while self._obey():
            if self._scheduler.has_work:
                events = self._scheduler.step()
                if events:
                    self._deliver(events)

    def _obey(self) -> bool:
        """Run every posted command, waiting for one where there is nothing else to do; False at `stop`."""
        wait = not self._scheduler.has_work
        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True
            if command is None:
                return False
            command(self._scheduler)
            wait = False
