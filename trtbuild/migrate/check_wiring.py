"""How the models fit together: the ensemble's maps, the BLS model's names, decoupled modes, batch sizes."""

from __future__ import annotations

from collections.abc import Mapping

from trtbuild.migrate.check_tensors import is_missing, sound_type
from trtbuild.migrate.findings import Findings
from trtbuild.migrate.models import Repository, Tensor, TritonModel
from trtbuild.migrate.parameters import nearest
from trtbuild.migrate.pbtxt import Message, Value
from trtbuild.migrate.tensor_tables import INPUTS, RENAMED_TENSORS

# tensorrt_llm_bls/1/model.py asks for these two by name.
_BLS_PARTNERS = ("preprocessing", "postprocessing")


def check_wiring(repository: Repository, findings: Findings) -> None:
    for ensemble in repository.of("ensemble"):
        if not ensemble.is_broken:
            check_ensemble(repository, ensemble, findings)
    for bls in repository.of("bls"):
        if not bls.is_broken:
            check_bls(repository, bls, findings)
    check_tokenizers(repository, findings)


def check_ensemble(repository: Repository, ensemble: TritonModel, findings: Findings) -> None:
    """Every step's model and tensors exist, every tensor comes from somewhere, and its type stays the same."""
    produced = {name: sound_type(ensemble, "input", name) for name in ensemble.inputs}
    for step in ensemble.steps:
        model = _step_model(repository, ensemble, step, findings)
        for inner, outer in _maps(step, "output_map"):
            produced[outer.text] = None
            if model is not None and not model.is_broken:
                produced[outer.text] = sound_type(model, "output", inner.text)
    for step in ensemble.steps:
        name = step.value("model_name")
        model = repository.named(name.text) if name else None
        if model is not None and not model.is_broken:
            _check_step(ensemble, step, model, produced, findings)
            _check_decoupled(ensemble, model, findings)
    _check_batch(repository, ensemble, findings)
    for tensor in ensemble.outputs.values():
        if tensor.name not in produced and ensemble.steps:
            findings.add(
                "error", "ensemble_map", ensemble.file, f"output.{tensor.name}", "made by no step",
                "a value of some step's output_map", "map a step's output to it, or remove it", tensor.line,
            )  # fmt: skip
        elif _differ(sound_type(ensemble, "output", tensor.name), produced.get(tensor.name)):
            findings.add(
                "error", "ensemble_type", ensemble.file, f"output.{tensor.name}", f"TYPE_{tensor.type}",
                f"TYPE_{produced[tensor.name]}, as the step that makes it", "use the same data_type in both",
                tensor.line,
            )  # fmt: skip


def _step_model(repository: Repository, ensemble: TritonModel, step: Message, findings: Findings) -> TritonModel | None:
    name = step.value("model_name")
    if name is None or name.is_placeholder:
        return None
    model = repository.named(name.text)
    if model is None:
        known = [model.name for model in repository.models if model is not ensemble]
        right = nearest(name.text, known, 0.6)
        findings.add(
            "error", "ensemble_step", ensemble.file, "step.model_name", name.text, ", ".join(known),
            f"write {right}" if right else "name a model of this repository", name.line,
        )  # fmt: skip
    return model


def _maps(step: Message, kind: str) -> list[tuple[Value, Value]]:
    found = []
    for entry in step.messages(kind):
        key, value = entry.value("key"), entry.value("value")
        if key is not None and value is not None:
            found.append((key, value))
    return found


def _check_step(
    ensemble: TritonModel, step: Message, model: TritonModel, produced: Mapping[str, str | None], findings: Findings
) -> None:
    tables: tuple[tuple[str, Mapping[str, Tensor]], ...] = (("input_map", model.inputs), ("output_map", model.outputs))
    for kind, tensors in tables:
        for inner, outer in _maps(step, kind):
            if is_missing(model, kind.split("_")[0], inner.text):
                continue
            if inner.text not in tensors:
                right = _renamed(inner.text, tensors) or nearest(inner.text, tensors)
                findings.add(
                    "error", "ensemble_map", ensemble.file, f"{model.name}.{kind}.{inner.text}", inner.text,
                    right or f"an {kind.split('_')[0]} of {model.name}",
                    f"rename it to {right}" if right else f"remove it, or add the tensor to {model.file}", inner.line,
                )  # fmt: skip
            elif kind == "input_map":
                _check_source(ensemble, model, inner, outer, produced, findings)
    mapped = {inner.text for inner, _ in _maps(step, "input_map")}
    for tensor in model.inputs.values():
        is_known = tensor.name in INPUTS.get(model.role, {}) or model.role not in INPUTS
        if not tensor.is_optional and is_known and tensor.name not in mapped:
            findings.add(
                "error", "ensemble_map", ensemble.file, f"{model.name}.input_map.{tensor.name}", "missing",
                f"{model.name} needs {tensor.name}", "map a tensor to it, or make it optional", step.line,
            )  # fmt: skip


def _check_source(
    ensemble: TritonModel, model: TritonModel, inner: Value, outer: Value, produced: Mapping[str, str | None],
    findings: Findings,
) -> None:  # fmt: skip
    key = f"{model.name}.input_map.{inner.text}"
    if outer.text not in produced:
        right = nearest(outer.text, produced)
        findings.add(
            "error", "ensemble_map", ensemble.file, key, outer.text,
            right or "an input of the ensemble or a step's output",
            f"write {right}" if right else "map a tensor that is made somewhere", outer.line,
        )  # fmt: skip
    elif _differ(sound_type(model, "input", inner.text), produced[outer.text]):
        findings.add(
            "error", "ensemble_type", ensemble.file, key, f"TYPE_{produced[outer.text]}",
            f"TYPE_{model.inputs[inner.text].type}, as in {model.file}", "use the same data_type in both", outer.line,
        )  # fmt: skip


def _renamed(name: str, tensors: Mapping[str, Tensor]) -> str | None:
    """What a tensor is called in the other releases, where the model has that."""
    others = [new if name == old else old for old, new, _, _ in RENAMED_TENSORS if name in (old, new)]
    return next((other for other in others if other in tensors), None)


def _differ(first: str | None, second: str | None) -> bool:
    return first is not None and second is not None and first != second


def _check_batch(repository: Repository, ensemble: TritonModel, findings: Findings) -> None:
    """Triton refuses an ensemble that admits more than one of its models."""
    names = [name.text for step in ensemble.steps if (name := step.value("model_name"))]
    models = [model for model in map(repository.named, names) if model is not None]
    allowed = {model.name: max(model.max_batch_size, 1) for model in models if model.max_batch_size is not None}
    least, found = min(allowed, key=lambda name: allowed[name], default=None), ensemble.max_batch_size
    if least is not None and found is not None and found > allowed[least]:
        line = ensemble.root.value("max_batch_size")
        findings.add(
            "error", "ensemble_batch", ensemble.file, "max_batch_size", found,
            f"at most {least}'s {allowed[least]}",
            "use the same max_batch_size in all models of the ensemble", line.line if line else None,
        )  # fmt: skip


def _check_decoupled(ensemble: TritonModel, model: TritonModel, findings: Findings) -> None:
    policy = ensemble.root.message("model_transaction_policy")
    if model.role == "tensorrt_llm" and policy is not None and None is not ensemble.decoupled != bool(model.decoupled):
        findings.add(
            "error", "decoupled", ensemble.file, "model_transaction_policy.decoupled", str(ensemble.decoupled).lower(),
            f"{str(bool(model.decoupled)).lower()}, as in {model.file}, or no model_transaction_policy",
            "remove it: an ensemble takes the mode of its models", policy.line,
        )  # fmt: skip


def check_bls(repository: Repository, bls: TritonModel, findings: Findings) -> None:
    name = bls.parameter("tensorrt_llm_model_name") or "tensorrt_llm"
    engines = [model.name for model in repository.of("tensorrt_llm")]
    target = repository.named(name)
    if target is None and engines:
        findings.add(
            "error", "bls_model", bls.file, "tensorrt_llm_model_name", name, " or ".join(engines),
            f"write {nearest(name, engines, 0.5) or engines[0]}", bls.line_of("tensorrt_llm_model_name"),
        )  # fmt: skip
    draft = bls.parameter("tensorrt_llm_draft_model_name")
    if draft is not None and repository.named(draft) is None:
        findings.add(
            "error", "bls_model", bls.file, "tensorrt_llm_draft_model_name", draft,
            "a model of this repository, or none",
            "name the draft model's directory, or leave it empty", bls.line_of("tensorrt_llm_draft_model_name"),
        )  # fmt: skip
    for partner in _BLS_PARTNERS:
        others = [model.name for model in repository.of(partner)]
        if repository.named(partner) is None and others:
            findings.add(
                "warning", "bls_model", bls.file, partner, ", ".join(others), f"a model that is called {partner}",
                f"upstream's {bls.name} calls {partner} by this name: keep the name, or change its model.py",
            )  # fmt: skip
    if target is not None and None not in (bls.decoupled, target.decoupled) and bls.decoupled != target.decoupled:
        policy = bls.root.message("model_transaction_policy")
        findings.add(
            "error", "decoupled", bls.file, "model_transaction_policy.decoupled", str(bls.decoupled).lower(),
            f"{str(target.decoupled).lower()}, as in {target.file}", "use the same mode in both",
            policy.line if policy else None,
        )  # fmt: skip


def check_tokenizers(repository: Repository, findings: Findings) -> None:
    """Pre- and postprocessing have the same tokenizer, where there is one of each and both are found."""
    before, after = repository.of("preprocessing"), repository.of("postprocessing")
    missing = {finding.file for finding in findings.items if finding.check == "tokenizer_path"}
    if len(before) != 1 or len(after) != 1 or missing & {before[0].file, after[0].file}:
        return
    first, second = before[0].parameter("tokenizer_dir"), after[0].parameter("tokenizer_dir")
    if first and second and first.rstrip("/") != second.rstrip("/"):
        findings.add(
            "warning", "tokenizer", after[0].file, "tokenizer_dir", second, f"{first}, as in {before[0].file}",
            "use the same tokenizer on both sides", after[0].line_of("tokenizer_dir"),
        )  # fmt: skip
