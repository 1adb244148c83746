"""`trtbuild verify`: an engine against the checkpoint that it was made from.

What is compared: distributions over texts, answers in different batches, a prompt at the engine's limit (all through
its executor), and every block of every layer (from its rank files, see `layer_errors`). Where the executor is TensorRT
its plans compute the former; int4 weights are in the plans, and the latter does not see the plans' own copy of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from trtbuild.accuracy.distributions import TextResult, WatchedExecutor, compare_text
from trtbuild.accuracy.gate import LIMIT_NAMES, Limits, find_failures
from trtbuild.accuracy.golden import Question, answer_all, judge, read_golden, summary
from trtbuild.accuracy.invariance import LAST_POSITIONS, check_invariance, check_long_prompt, prompts_of
from trtbuild.accuracy.layer_errors import group_errors, walk_layers
from trtbuild.accuracy.models import EngineModel, SourceModel, source_executor, source_executor_bytes
from trtbuild.accuracy.record import RECORD_FORMAT, environment, plain_numbers
from trtbuild.accuracy.text_blocks import DEFAULT_NUM_TOKENS, EvaluationText, TextBlocks, cut_text
from trtbuild.checkpoints.lora import LoraAdapter
from trtbuild.checkpoints.model_config import ModelConfig
from trtbuild.checkpoints.precision import CALIBRATED
from trtbuild.checkpoints.rank_checkpoint import RankCheckpoint
from trtbuild.checkpoints.source import CheckpointSource
from trtbuild.checkpoints.tokenizer import load_tokenizer
from trtbuild.engines.calibration.devices import compute_device
from trtbuild.engines.device.choice import choose_executor, examine_machine
from trtbuild.engines.load import LoadedEngine, load_engine
from trtbuild.engines.passport import Passport, write_accuracy
from trtbuild.errors import CheckFailed, Refused
from trtbuild.progress import ProgressFactory, no_progress

# Of the free memory; the rest is for activations and logits.
_MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class VerifyOptions:
    """What the command line says; limits that are None are the precision's (see `gate`)."""

    source: str | None = None
    texts: tuple[Path, ...] = ()
    num_tokens: int = DEFAULT_NUM_TOKENS
    golden: Path | None = None
    limits: dict[str, float] = field(default_factory=dict)
    executor: str = "auto"
    device: str = "auto"
    """See `compute_device`."""

    @classmethod
    def from_flags(cls, **flags: Any) -> VerifyOptions:
        """Flags by their names; those that are None were not given."""
        given = {name: value for name, value in flags.items() if value is not None}
        limits = {name: given.pop(name) for name in LIMIT_NAMES if name in given}
        return cls(limits=limits, **given)


def verify_engine(
    engine_dir: Path, options: VerifyOptions, *, sources: Path | None = None, progress: ProgressFactory = no_progress
) -> Passport:
    """Run every check, write the record into the passport, and return it; the record says whether all passed.

    `sources` is where a checkpoint in an object store was fetched to. Raises Refused or CheckpointError for a source,
    text or golden line that does not fit, before any weight is read.
    """
    job = _Job.prepare(engine_dir, options, sources, progress)
    final, blocks = job.walk(progress)
    found = job.ask_executor(final, progress)
    record = plain_numbers(job.record(found | {"blocks": blocks}))
    return write_accuracy(job.passport, record)


def check_passed(passport: Passport) -> None:
    """Raise CheckFailed with every check of the record that failed."""
    record = passport.data["accuracy"]
    if not record["passed"]:
        lines = "".join(f"\n  - {line}" for line in record["failures"])
        raise CheckFailed(
            f"{passport.name} is not what its source is ({len(record['failures'])} checks failed):{lines}"
        )


@dataclass(frozen=True)
class _Job:
    """Everything opened and checked."""

    passport: Passport
    checkpoint: RankCheckpoint
    source: CheckpointSource
    model: SourceModel
    tokenizer: Any
    texts: list[TextBlocks]
    long_prompt: list[int]
    questions: list[Question]
    limits: Limits
    options: VerifyOptions
    device: torch.device

    @classmethod
    def prepare(cls, engine_dir: Path, options: VerifyOptions, sources: Path | None, progress: ProgressFactory) -> _Job:
        passport = Passport.open(engine_dir)
        passport.check_runnable()
        device = compute_device(options.device)
        choose_executor(passport, options.executor, None, examine_machine(passport))
        tokenizer = load_tokenizer(passport.tokenizer_directory)
        longest = passport.limits.max_input_len or passport.limits.max_seq_len - 1
        opened = [EvaluationText.open(file) for file in options.texts or (None,)]
        texts = [cut_text(text, tokenizer, options.num_tokens, passport.limits.max_seq_len) for text in opened]
        questions = read_golden(options.golden, tokenizer, longest) if options.golden else []
        source = open_source(passport, options.source, sources, progress)
        passport.check_files()
        checkpoint = RankCheckpoint.open(engine_dir)
        precisions = {linear.precision for plan in checkpoint.plans for linear in plan.linears}
        calibrated = passport.precision.weights in CALIBRATED
        limits = Limits.for_engine(precisions, calibrated=calibrated, **options.limits)
        return cls(
            passport, checkpoint, source, SourceModel(source, passport.limits.max_seq_len, device), tokenizer, texts,
            texts[0].repeated(longest), questions, limits, options, device,
        )  # fmt: skip

    def walk(self, progress: ProgressFactory) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
        """The source's final hidden states of every block, the long prompt last; the errors of the engine's blocks."""
        engine = EngineModel(self.checkpoint, self.passport.limits.max_seq_len, self.device)
        sequences = [*(block for text in self.texts for block in text.blocks), self.long_prompt]
        final, errors = walk_layers(self.model, engine, sequences, progress=progress)
        return final, group_errors(errors)

    def ask_executor(self, final: Sequence[torch.Tensor], progress: ProgressFactory) -> dict[str, Any]:
        """Everything that goes through the engine's executor."""
        device = None if self.options.device == "auto" else str(self.device)
        with progress(f"loading {self.passport.name}", 1):
            engine = load_engine(self.passport.directory, executor=self.options.executor, device=device)
        executor = WatchedExecutor(engine.executor)
        try:
            found = self._compare(executor, final, progress)
            answers = self._answers(engine, executor)
            builder = self.passport.data["builder"]
            made_by = environment(executor.name, engine.executor_why, str(executor.device), builder)
        finally:
            executor.close()
        found["logits"] = {"rows": executor.num_rows, "not_finite": executor.num_not_finite}
        # The engine's memory is free again before the source's own executor takes as much.
        return made_by | found | {"golden": self._golden(answers, progress)}

    def _compare(
        self, executor: WatchedExecutor, final: Sequence[torch.Tensor], progress: ProgressFactory
    ) -> dict[str, Any]:
        texts: list[TextResult] = []
        count = sum(len(text.blocks) for text in self.texts)
        with progress("comparing answers", count + 2, "blocks") as bar, torch.inference_mode():
            first = 0
            for text in self.texts:
                states = final[first : first + len(text.blocks)]
                texts.append(
                    compare_text(executor, text, lambda i, states=states: self.model.logits(states[i]), bar.advance)
                )
                first += len(text.blocks)
            last = final[-1][-min(LAST_POSITIONS, executor.chunk_size) :]
            long_prompt = check_long_prompt(executor, self.long_prompt, self.model.logits(last))
            bar.advance()
            longest = len(self.long_prompt)
            prompts = prompts_of([block for text in self.texts for block in text.blocks], longest)
            has_fp8 = any("fp8" in name for name in self._precisions())
            compute = "fp8" if has_fp8 else self.passport.precision.dtype
            strict = self.checkpoint.config.moe is None and not has_fp8
            invariance = check_invariance(executor, prompts, compute, self.checkpoint.config.num_layers, strict=strict)
            bar.advance()
        return {"texts": [text.to_dict() for text in texts], "long_prompt": long_prompt, "invariance": invariance}

    def _answers(self, engine: LoadedEngine, executor: WatchedExecutor) -> list[str]:
        if not self.questions:
            return []
        return answer_all(executor, self.questions, self.tokenizer, engine.eos_token_ids)

    def _golden(self, answers: list[str], progress: ProgressFactory) -> dict[str, Any] | None:
        """The source answers with a reference executor in its own 16-bit type, where that fits in memory."""
        if not self.questions:
            return None
        from trtbuild.engines.load import eos_token_ids

        theirs = None
        if source_executor_bytes(self.source, self.passport.limits) <= _free_bytes(self.device) * _MEMORY_SHARE:
            with progress("the source answers", 1):
                executor = source_executor(self.source, self.passport.limits, self.device)
                eos = eos_token_ids(self.passport, self.tokenizer)
                theirs = answer_all(executor, self.questions, self.tokenizer, eos)
                executor.close()
        lines = judge(self.questions, answers, theirs)
        return {"source_ran": theirs is not None, "lines": lines, "summary": summary(lines)}

    def record(self, found: dict[str, Any]) -> dict[str, Any]:
        record = {
            "format": RECORD_FORMAT,
            **found,
            "source": {
                "model": self.source.model, "revision": self.source.revision, "digest": self.source.digest,
                "lora": [str(adapter.directory) for adapter in self.source.adapters], "dtype": "float32",
            },
            "config": config_differences(self.checkpoint.config, self.source.config),
            "limits": self.limits.to_dict(),
            "precisions": sorted(self._precisions()),
        }  # fmt: skip
        failures = find_failures(record)
        return record | {"passed": not failures, "failures": failures}

    def _precisions(self) -> set[str]:
        return {linear.precision for plan in self.checkpoint.plans for linear in plan.linears}


def open_source(
    passport: Passport, moved: str | None, sources: Path | None, progress: ProgressFactory = no_progress
) -> CheckpointSource:
    """The checkpoint that an engine was made from, or where it is now; Refused where its content is another."""
    recipe, made_of = passport.data["recipe"], passport.data["source"]
    try:
        source = CheckpointSource.open(
            moved or recipe["model"], None if moved else made_of["revision"], sources=sources, progress=progress
        )
    except Refused as error:
        if moved:
            raise
        raise Refused(f"{error.message}; --source says where the checkpoint of {passport.name} is now") from error
    source = source.with_lora([LoraAdapter.parse(text) for text in recipe["lora"]])
    if source.digest != made_of["digest"]:
        raise Refused(
            f"{source.model} has digest {source.digest[:16]}, and {passport.name} was made from {made_of['model']} "
            f"with {made_of['digest'][:16]}; name that checkpoint with --source, or rebuild: {passport.rebuild} --force"
        )
    return source


def config_differences(engine: ModelConfig, source: ModelConfig) -> dict[str, tuple[Any, Any]]:
    """Field -> (the engine's, the source's), where they differ."""
    ours, theirs = engine.to_dict(), source.to_dict()
    return {name: (ours.get(name), value) for name, value in theirs.items() if ours.get(name) != value}


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
