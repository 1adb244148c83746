"""Compiling an engine's plans with TensorRT-RTX: each in a process of its own, each journalled by its record.

A plan, its log and its record appear under their final names only when complete, the record last. A build that was
killed continues with what has no record; a plan whose inputs changed has another digest and is built again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import cast

from trtbuild.checkpoints.rank_checkpoint import WeightReader
from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.tensorrt.plan_record import PlanRecord
from trtbuild.engines.tensorrt.plan_tasks import BuildOptions, PlanTask, plan_tasks
from trtbuild.errors import EngineBuildError, TrtBuildError

# Opens one rank's weights in a build process: must pickle (a module-level function, or a partial of one).
ReaderFactory = Callable[[int], WeightReader]
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
    on_plan: OnPlan | None = None,
) -> list[PlanRecord]:
    """Build every plan of an engine into `directory`, verified, and return their records in the order of execution.

    `workers` processes compile at a time; 0 compiles in this process (tests). `open_reader` and `weights_digest` are
    needed where weights are embedded. Raises `EngineBuildError` where TensorRT fails or logs an error, `CheckFailed`
    where a plan is not what was asked.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tasks = plan_tasks(plans, options, weights_digest)
    if open_reader is None and any(task.embedded for task in tasks):
        raise ValueError("plans with embedded weights need a reader of the rank weights")
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
    for record in _build(missing, directory, open_reader, workers):
        records[record.digest] = record
        report(record, True, len(tasks))
    return [records[task.digest] for task in tasks]


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
) -> Iterator[PlanRecord]:
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


class _Child:
    """The process of one plan: the builder keeps memory, and a crash of it must not take anything along."""

    def __init__(self, task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.task = task
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child_main, args=(theirs, task, directory, open_reader), daemon=True)
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


def _child_main(connection: Connection, task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> None:
    try:
        connection.send(build_one(task, directory, open_reader))
    except TrtBuildError as error:
        connection.send(error)


def build_one(task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> PlanRecord:
    """Compile, read back and verify one plan; writes NAME.plan, NAME.log and, last, NAME.json."""
    from trtbuild.engines.tensorrt.plan_compiler import compile_task

    record, plan, log = compile_task(task, open_reader)
    for name, content in ((record.file, plan), (f"{task.name}.log", log.encode())):
        write_atomic(directory / name, content)
    write_atomic(directory / f"{task.name}.json", json.dumps(record.to_dict(), indent=1).encode())
    return record


def write_atomic(path: Path, content: bytes) -> None:
    """Write beside `path`, flush to disk, and rename: the name never shows a part of a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
