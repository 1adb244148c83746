"""Compiling an engine's plans with TensorRT-RTX: each in a process of its own, each journalled by its record.

A plan, its log and its record appear under their final names only when complete, the record last. A build that was
killed continues with what has no record; a plan whose inputs changed has another digest and is built again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

from trtbuild.checkpoints.rank_tensors import RankPlan
from trtbuild.engines.bindings import WeightReader
from trtbuild.engines.plan_record import PlanRecord
from trtbuild.engines.plan_tasks import BuildOptions, PlanTask, plan_tasks
from trtbuild.errors import EngineBuildError

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
    """Records in the order in which the builds end."""
    if not tasks:
        return
    if workers == 0:
        for task in tasks:
            yield build_one(task, directory, open_reader)
        return
    context = multiprocessing.get_context("spawn")
    # A process for each plan: the builder keeps memory, and a crash of it must not take others along.
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, max_tasks_per_child=1) as pool:
        pending: dict[Future[PlanRecord], PlanTask] = {pool.submit(build_one, task, directory, open_reader): task for task in tasks}
        try:
            while pending:
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    task = pending.pop(future)
                    yield _result(future, task)
        finally:
            for future in pending:
                future.cancel()


def _result(future: Future[PlanRecord], task: PlanTask) -> PlanRecord:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise EngineBuildError(
            f"the process that compiled plan {task.name} (or one beside it) died: out of memory, or a crash inside "
            "TensorRT-RTX; fewer --workers or a smaller --segment-layers need less memory, finished plans are kept"
        ) from error


def build_one(task: PlanTask, directory: Path, open_reader: ReaderFactory | None) -> PlanRecord:
    """Compile, read back and verify one plan; writes NAME.plan, NAME.log and, last, NAME.json."""
    from trtbuild.engines.plan_compiler import compile_task

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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
