"""Compiling an engine's plans with TensorRT-RTX: each in a process of its own, each journalled by its record.

A plan, its log and its record appear under their final names only when complete, the record last. A build that was
killed continues with what has no record; a plan whose inputs changed has another digest and is built again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.ends_with_parent import end_with_parent
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, PlanTask, plan_tasks
from trtbuild.errors import EngineBuildError, TrtBuildError
from trtbuild.pools import Pool
from trtbuild.workspace import atomic_file, write_atomic

# Opens one rank's weights in a build process: must pickle (a module-level function, or a partial of one).
ReaderFactory = Callable[[int], WeightReader]
# Memory that a build asks of a pool: the builder's own, and this many times the weights that it embeds.
TASK_MEMORY = 1 << 30
EMBEDDED_FACTOR = 5
# Called after each plan with its record, whether it was built now or found, and how many there are in all.
OnPlan = Callable[[PlanRecord, bool, int], None]


def build_plans(
    plans: Sequence[RankPlan],
    options: BuildOptions,
    directory: Path,
    *,
    open_reader: ReaderFactory | None = None,
    weights_digest: str | None = None,
    workers: int = 1,
    pool: Pool | None = None,
    on_plan: OnPlan | None = None,
) -> list[PlanRecord]:
    """Build every plan of an engine into `directory`, verified, and return their records in the order of execution.

    `workers` processes compile at a time, or those of `pool`; 0 compiles in this process (tests). `open_reader` and
    `weights_digest` are needed where weights are embedded. Raises `EngineBuildError` where TensorRT fails or logs an
    error, `CheckFailed` where a plan is not what was asked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tasks = plan_tasks(plans, options, weights_digest)
    if open_reader is None and any(task.embedded for task in tasks):
        raise ValueError("plans with embedded weights need a reader of the rank weights")
    _remove_leftovers(directory)
    report = on_plan or (lambda record, built, total: None)
    records: dict[str, PlanRecord] = {}
    missing = []
    for task in tasks:
        record = finished(task, directory)
        if record is None:
            missing.append(task)
        else:
            records[task.digest] = record
            report(record, False, len(tasks))
    builds = _build(missing, directory, open_reader, workers)
    if pool is not None:
        builds = _build_on_pool(pool, missing, directory.absolute(), open_reader)
    with closing(builds):
        for record in builds:
            records[record.digest] = record
            report(record, True, len(tasks))
    _remove_leftovers(directory)
    return [records[task.digest] for task in tasks]


def _remove_leftovers(directory: Path) -> None:
    """What builds that were killed had begun to write."""
    for file in directory.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def finished(task: PlanTask, directory: Path) -> PlanRecord | None:
    """The record of a plan that is complete and follows from the same inputs, or None."""
    try:
        record = PlanRecord.from_dict(json.loads((directory / f"{task.name}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, TypeError, KeyError):
        return None
    plan = directory / record.file
    if record.digest != task.digest or not plan.is_file() or plan.stat().st_size != record.size:
        return None
    return replace(record, serves=task.serves)


def _build(
    tasks: Sequence[PlanTask], directory: Path, open_reader: ReaderFactory | None, workers: int
) -> Generator[PlanRecord, None, None]:
    """Records in the order in which the builds end; the first failure ends the others."""
    if workers == 0:
        for task in tasks:
            yield build_one(task, directory, open_reader)
        return
    waiting, running = list(tasks), dict[Connection, _Child]()
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                child = _Child(waiting.pop(0), directory, open_reader)
                running[child.connection] = child
            for ready in wait(list(running)):
                yield running.pop(cast("Connection", ready)).result()
    finally:
        for child in running.values():
            child.process.terminate()
            child.process.join()


def _build_on_pool(
    pool: Pool, tasks: Sequence[PlanTask], directory: Path, open_reader: ReaderFactory | None
) -> Generator[PlanRecord, None, None]:
    """The same by a pool's workers, which see `directory`; each plan in a process of its own there too."""
    build = partial(build_one, directory=directory, open_reader=open_reader)
    with closing(pool.run(build, tasks, memory_bytes=_task_memory(tasks), own_process=True)) as records:
        yield from records


def _task_memory(tasks: Sequence[PlanTask]) -> int:
    """What the largest build may take: the builder, and its copies of the weights that stand in the plan."""
    embedded = [
        sum(spec.num_bytes for spec in task.segment.weights(task.plan).values()) for task in tasks if task.embedded
    ]
    return TASK_MEMORY + EMBEDDED_FACTOR * max(embedded, default=0)


class _Child:
    """The process of one plan: the builder keeps memory, and a crash of it must not take anything along."""

    def __init__(self, task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self.connection, theirs = context.Pipe(duplex=False)
        arguments = (theirs, os.getpid(), task, directory, open_reader)
        self.process = context.Process(target=_child_main, args=arguments, daemon=True)
        with _without_ctrl_c():
            self.process.start()
        theirs.close()

    def result(self) -> PlanRecord:
        """The record; raises what the child raised, or `EngineBuildError` where it died without a word."""
        try:
            outcome = self.connection.recv()
        except EOFError:
            outcome = None
        self.process.join()
        if isinstance(outcome, TrtBuildError):
            raise outcome
        if outcome is None:
            raise EngineBuildError(
                f"the process that compiled plan {self.task.name} died (exit code {self.process.exitcode}): out of "
                "memory, or a crash inside TensorRT-RTX; fewer --workers or a smaller --segment-layers need less "
                "memory, and the plans that are finished are kept"
            )
        return outcome


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """A process that starts here never sees Ctrl-C, which a terminal sends to all: its parent gets it, and ends it."""
    # Starting the tracker later would let the signal through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child_main(
    connection: Connection, parent: int, task: PlanTask, directory: Path, open_reader: ReaderFactory | None
) -> None:
    # A build takes minutes and gigabytes.
    end_with_parent(signal.SIGKILL, parent)
    try:
        outcome = build_one(task, directory, open_reader)
    except TrtBuildError as error:
        outcome = error
    except OSError as error:
        # A full disk, most of all.
        outcome = EngineBuildError(f"plan {task.name}: {error.filename or directory}: {error.strerror}")
    # The parent may be gone: then nobody wants to know.
    with suppress(BrokenPipeError):
        connection.send(outcome)


def build_one(task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> PlanRecord:
    """Compile, read back and verify one plan; writes NAME.plan, NAME.log and, last, NAME.json."""
    from trtbuild.engines.tensorrt.plan_compiler import compile_task

    with atomic_file(directory / f"{task.name}.plan") as plan:
        record, log = compile_task(task, open_reader, plan)
    write_atomic(directory / f"{task.name}.log", log.encode())
    write_atomic(directory / f"{task.name}.json", json.dumps(record.to_dict(), indent=1).encode())
    return record
