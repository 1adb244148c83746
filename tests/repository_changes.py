"""Changes that make mistakes in a hand-filled repository, and what migrate finds in it then."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hand_filled_repository import HandFilled, hand_filled

from trtbuild.migrate.findings import Finding
from trtbuild.migrate.migrate import migrate_repository

Change = Callable[[HandFilled], object]
ENGINE, PRE, POST = "tensorrt_llm/config.pbtxt", "preprocessing/config.pbtxt", "postprocessing/config.pbtxt"
ENSEMBLE, BLS = "ensemble/config.pbtxt", "tensorrt_llm_bls/config.pbtxt"


def parameter(name: str, value: str, model: str = "tensorrt_llm") -> Change:
    return lambda repo: repo.models[model].parameters.update({name: value})


def renamed(old: str, new: str, model: str = "tensorrt_llm") -> Change:
    def change(repo: HandFilled) -> None:
        parameters = repo.models[model].parameters
        parameters[new] = parameters.pop(old)

    return change


def dropped(name: str, model: str = "tensorrt_llm") -> Change:
    return lambda repo: repo.models[model].parameters.pop(name)


def engine(**sections: dict[str, Any]) -> Change:
    return lambda repo: repo.edit_engine(**sections)


def both(*changes: Change) -> Change:
    return lambda repo: [change(repo) for change in changes]


def tensor(model: str, name: str, type_: str = "TYPE_INT32", dims: str = "1", optional: bool = False) -> Change:
    def change(repo: HandFilled) -> None:
        tables = (repo.models[model].inputs, repo.models[model].outputs)
        table = tables[1] if name in tables[1] else tables[0]
        table[name] = (type_, dims, optional)

    return change


def tensor_renamed(old: str, new: str, model: str = "tensorrt_llm") -> Change:
    def change(repo: HandFilled) -> None:
        inputs = repo.models[model].inputs
        inputs[new] = inputs.pop(old)

    return change


def map_renamed(step: str, old: str, new: str) -> Change:
    def change(repo: HandFilled) -> None:
        inputs = repo.models["ensemble"].steps[step][0]
        inputs[new] = inputs.pop(old)

    return change


def source(inner: str, outer: str) -> Change:
    return lambda repo: repo.models["ensemble"].steps["tensorrt_llm"][0].update({inner: outer})


def batch(value: str, *models: str) -> Change:
    def change(repo: HandFilled) -> None:
        for model in models or repo.models:
            repo.models[model].max_batch_size = value

    return change


def extra(model: str, line: str) -> Change:
    return lambda repo: repo.models[model].extra.append(line)


def replaced(model: str, old: str, new: str) -> Change:
    def change(repo: HandFilled) -> None:
        lines = repo.models[model].extra
        assert any(old in line for line in lines)
        repo.models[model].extra = [line.replace(old, new) for line in lines]

    return change


def directory_renamed(old: str, new: str) -> Change:
    return lambda repo: (repo.root / old).rename(repo.root / new)


def script(text: str) -> Change:
    return lambda repo: (repo.root / "build.sh").write_text(text, encoding="utf-8")


def engine_file(name: str, content: str | None) -> Change:
    def change(repo: HandFilled) -> None:
        path = repo.engine / name
        path.unlink() if content is None else path.write_text(content, encoding="utf-8")

    return change


def old_engine(repo: HandFilled) -> None:
    builder = {"max_batch_size": 4, "max_input_len": 156, "max_output_len": 100, "max_beam_width": 1}
    builder |= {"tensor_parallel": 1, "pipeline_parallel": 1, "precision": "float16", "name": "llama"}
    plugins = {"paged_kv_cache": True, "remove_input_padding": True, "use_paged_context_fmha": True}
    content = {"builder_config": builder, "plugin_config": plugins}
    (repo.engine / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (repo.engine / "rank0.engine").rename(repo.engine / "llama_float16_tp1_rank0.engine")


def second_engine(repo: HandFilled) -> None:
    other = hand_filled(repo.root.parent / "other" / "repo", "1.1.0")
    repo.models["draft"] = other.models["tensorrt_llm"]


def no_paged_attention(*changes: Change) -> Change:
    off = parameter("enable_kv_cache_reuse", "false")
    return both(engine(plugins={"use_paged_context_fmha": False}), off, *changes)


def findings_of(repo: HandFilled, after: Change | None = None, **options: Any) -> list[Finding]:
    repo.write()
    if after is not None:
        after(repo)
    return migrate_repository(repo.root, **options).findings
