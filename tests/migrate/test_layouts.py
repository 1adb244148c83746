"""Right repositories in the layouts of the releases, models under other names, and repositories of another kind."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from hand_filled_repository import RELEASES, ModelText, hand_filled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trtllm_engine import make_trtllm_engine

from trtbuild.engines.passport import Passport
from trtbuild.engines.tensorrt_llm.engine_config import TrtllmEngine
from trtbuild.errors import Refused
from trtbuild.migrate.migrate import migrate_repository
from trtbuild.migrate.pbtxt import Message, read_pbtxt
from trtbuild.triton_repo.tensorrt_llm.options import TrtllmOptions
from trtbuild.triton_repo.tensorrt_llm.repository import write_repository

ROLES = {
    "preprocessing": "preprocessing", "tensorrt_llm": "tensorrt_llm", "postprocessing": "postprocessing",
    "ensemble": "ensemble", "tensorrt_llm_bls": "bls",
}  # fmt: skip


@pytest.mark.parametrize("release", RELEASES)
def test_right_repository_has_nothing_but_notes(release: str, tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo", release)
    found = migrate_repository(repo.write())
    assert found.roles == ROLES
    assert str(found.release) == release
    assert {finding.severity for finding in found.findings} == {"info"}
    assert {finding.check for finding in found.findings} == {"placeholder"}
    found.check()
    assert [engine.model for engine in found.engines] == ["tensorrt_llm"]


def test_every_other_release_is_told(tmp_path: Path) -> None:
    """The newest layout served by the oldest release: what that does not read is named, and the version."""
    repo = hand_filled(tmp_path / "repo", "1.2.1")
    found = migrate_repository(repo.write(), release="0.8.0")
    checks = {(f.check, f.key) for f in found.findings if f.severity != "info"}
    assert ("tensor_release", "input.seed") in checks
    assert ("parameter_release", "multi_block_mode") in checks
    assert {check for check, _ in checks} == {"tensor_release", "parameter_release", "version"}


def test_models_are_found_under_any_name(tmp_path: Path) -> None:
    names = {"preprocessing": "tok", "tensorrt_llm": "llama", "postprocessing": "detok", "ensemble": "all"}
    repo = hand_filled(tmp_path / "repo")
    repo.models = {names.get(name, name): model for name, model in repo.models.items() if name != "tensorrt_llm_bls"}
    steps = repo.models["all"].steps
    repo.models["all"].steps = {names[name]: maps for name, maps in steps.items()}
    repo.models["llama"].backend = 'backend: "${triton_backend}"'
    found = migrate_repository(repo.write())
    assert found.roles == {names[name]: role for name, role in ROLES.items() if name in names}
    assert [f.key for f in found.findings if f.severity == "error"] == ["backend"]


def test_container_paths_are_found_through_mounts_and_inside_the_repository(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.models["tensorrt_llm"].parameters["gpt_model_path"] = "/engines/mixtral/"
    for name in ("preprocessing", "postprocessing"):
        repo.models[name].parameters["tokenizer_dir"] = "/models/preprocessing/1/tokenizer"
    root = repo.write()
    shutil.copytree(repo.engine / "tokenizer", root / "preprocessing" / "1" / "tokenizer")
    missing = migrate_repository(root)
    assert [f.check for f in missing.findings if f.severity == "error"] == ["engine_path"]
    assert not missing.engines
    (tmp_path / "disk").mkdir()
    repo.engine.rename(tmp_path / "disk" / "mixtral")
    found = migrate_repository(root, mounts=[f"/engines={tmp_path / 'disk'}"])
    assert not [f for f in found.findings if f.severity != "info"]
    assert found.engines[0].directory == tmp_path / "disk" / "mixtral"
    with pytest.raises(Refused, match="must be CONTAINER=HERE"):
        migrate_repository(root, mounts=["/engines"])


def test_llm_api_repository_has_nothing_to_migrate(tmp_path: Path) -> None:
    version = tmp_path / "repo" / "tensorrt_llm" / "1"
    version.mkdir(parents=True)
    model = ModelText(inputs={"text_input": ("TYPE_STRING", "-1", False), "streaming": ("TYPE_BOOL", "1", True)})
    (version.parent / "config.pbtxt").write_text(model.text("tensorrt_llm"), encoding="utf-8")
    (version / "model.yaml").write_text("model: meta-llama/Llama-3.1-8B-Instruct\n", encoding="utf-8")
    found = migrate_repository(tmp_path / "repo")
    assert [(f.severity, f.check) for f in found.findings] == [("info", "llmapi")]
    assert "nothing to migrate" in found.findings[0].fix
    assert not found.engines


def test_what_package_writes_has_nothing_wrong(tmp_path: Path) -> None:
    """Two independent readings of upstream's tensors, types and parameters agree."""
    engine = make_trtllm_engine(tmp_path / "tiny-trtllm")
    options = TrtllmOptions(kv_cache_free_gpu_mem_fraction=0.8)
    write_repository(tmp_path / "repo", Passport.open(engine), TrtllmEngine.open(engine), options)
    found = migrate_repository(tmp_path / "repo")
    assert found.roles == ROLES
    assert not found.findings
    assert found.engines[0].options.values["kv_cache_free_gpu_mem_fraction"] == "0.8"


def test_gpt_layout_is_deprecated(tmp_path: Path) -> None:
    directory = tmp_path / "repo" / "tensorrt_llm"
    (directory / "1").mkdir(parents=True)
    inputs = {"input_ids": ("TYPE_INT32", "-1", False), "input_lengths": ("TYPE_INT32", "1", False)}
    outputs = {"output_ids": ("TYPE_INT32", "-1, -1", False)}
    model = ModelText(inputs=inputs, outputs=outputs, parameters={"engine_dir": "/engines/gpt"})
    (directory / "config.pbtxt").write_text(model.text("tensorrt_llm"), encoding="utf-8")
    found = migrate_repository(tmp_path / "repo")
    assert [(f.severity, f.check) for f in found.findings] == [("error", "gpt_layout")]


def test_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no directory with a config"):
        migrate_repository(tmp_path)
    repo = hand_filled(tmp_path / "repo")
    with pytest.raises(Refused, match="give its parent"):
        migrate_repository(repo.write() / "tensorrt_llm")
    with pytest.raises(Refused, match="is not a directory"):
        migrate_repository(tmp_path / "nothing")
    with pytest.raises(Refused, match="must be a version"):
        migrate_repository(repo.root, release="newest")
    with pytest.raises(Refused, match="not in the table"):
        migrate_repository(repo.root, container="19.01")


def test_damaged_engine_config_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Values of a wrong type are as if they were not there."""
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(
        build={"max_batch_size": "four", "max_seq_len": -1, "lora_config": 3, "speculative_decoding_mode": [1]},
        pretrained={"mapping": "tp2", "moe": None, "quantization": 7, "architecture": None},
        top={"version": 12},
    )  # fmt: skip
    found = migrate_repository(repo.write())
    assert {f.check for f in found.findings if f.severity != "info"} == {"version"}
    assert "max_batch_size" not in found.engines[0].recipe.fields


def test_a_world_size_out_of_a_damaged_file_costs_no_memory(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.edit_engine(mapping={"tp_size": 10**15, "world_size": 10**15})
    [finding] = [f for f in migrate_repository(repo.write()).findings if f.severity != "info"]
    assert finding.check == "rank_files"
    assert "rank1.engine, rank2.engine" in finding.fix


def test_control_characters_of_a_file_are_not_printed(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    repo.models["tensorrt_llm"].parameters["max_beam_width"] = "\x1b[31m" + "x" * 5000
    [finding] = [f for f in migrate_repository(repo.write()).findings if f.severity != "info"]
    assert finding.found.startswith("\\x1b[31mxxx")
    assert len(finding.found) < 700


def test_syntax_without_protobuf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra that has Triton's protobuf need not be installed."""
    repo = hand_filled(tmp_path / "repo")
    repo.models["postprocessing"].extra.append("dynamic_batching {")
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    found = [f for f in migrate_repository(repo.write()).findings if f.severity != "info"]
    assert [(f.check, f.file) for f in found] == [("syntax", "postprocessing/config.pbtxt")]
    assert "has no '}'" in found[0].found


def test_not_text(tmp_path: Path) -> None:
    repo = hand_filled(tmp_path / "repo")
    (repo.write() / "postprocessing" / "config.pbtxt").write_bytes(b'name: "x"\nbackend: "\xff\xfe"\n')
    found = [f for f in migrate_repository(repo.root).findings if f.check == "unreadable"]
    assert [(f.file, f.line) for f in found] == [("postprocessing/config.pbtxt", 2)]


_PIECES = st.lists(
    st.one_of(
        st.sampled_from([
            "input", "output", "parameters", "name", "key", "value", "string_value", "data_type", "dims", "step",
            "true",
            "ensemble_scheduling", "model_name", "input_map", "max_batch_size", "backend", "TYPE_INT32",
            "gpt_model_path",
            "model_transaction_policy", "decoupled", "instance_group", "count", "1", "-1", "${engine_dir}", "${", "}",
            "{", "[", "]", ":", ",", ";", "<", ">", '"', "'", '"tensorrtllm"', '"input_ids"', '"gpt_model_path"', "\n",
            "#",
            '"ensemble"', '"gpu_device_ids"', '"0,1;2"', '"max_beam_width"', '"preprocessing"', "platform",
        ]),
        st.text(max_size=8),
    ),
    max_size=60,
).map(" ".join)  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hand_filled(tmp_path_factory.mktemp("any") / "repo").write()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(st.text(), _PIECES, st.binary()), name=st.sampled_from(sorted(ROLES)))
def test_any_text_in_place_of_a_config_is_reported_and_never_fails(written: Path, text: str | bytes, name: str) -> None:
    file = written / name / "config.pbtxt"
    before = file.read_bytes()
    try:
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
        found = migrate_repository(written)
        assert all(f.fix and f.allowed and f.key for f in found.findings)
        for engine in found.engines:
            assert engine.toml
    finally:
        file.write_bytes(before)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 6000), length=st.integers(0, 60), new=st.sampled_from(["", "}", '"', "${x}", "{", "\\"]))
def test_a_damaged_place_is_reported_and_never_fails(written: Path, position: int, length: int, new: str) -> None:
    file = written / "tensorrt_llm" / "config.pbtxt"
    before = file.read_text(encoding="utf-8")
    try:
        file.write_text(before[:position] + new + before[position + length :], encoding="utf-8")
        migrate_repository(written)
    finally:
        file.write_text(before, encoding="utf-8")


@given(text=st.one_of(st.text(), _PIECES))
def test_tolerant_reader_reads_any_text(text: str) -> None:
    document = read_pbtxt(text)
    assert all(1 <= value.line <= text.count("\n") + 1 for _, value in document.root.scalars())
    assert all(1 <= line <= text.count("\n") + 1 for line, _ in document.problems)


def test_deep_blocks_do_not_exhaust_the_stack() -> None:
    document = read_pbtxt("a {" * 100_000)
    assert any("deep" in what for _, what in document.problems)


def test_tolerant_reader_agrees_with_protobuf(tmp_path: Path) -> None:
    """Every scalar of a right file, in its place, with its line."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    repo = hand_filled(tmp_path / "repo")
    for name, model in repo.models.items():
        text = model.text(name)
        document = read_pbtxt(text)
        assert not document.problems
        message = text_format.Parse(text, model_config_pb2.ModelConfig())  # type: ignore[attr-defined]
        ours = {entry.value("name").text: entry for entry in document.root.messages("input")}  # type: ignore[union-attr]
        assert list(ours) == [tensor.name for tensor in message.input]
        for tensor in message.input:
            entry = ours[tensor.name]
            assert [value.number for value in entry.values("dims")] == list(tensor.dims)
            assert (entry.value("optional") is not None) == tensor.optional
        parameters = {key: entry.string_value for key, entry in message.parameters.items()}
        assert dict(_parameters(document.root)) == parameters
        lines = text.splitlines()
        assert all(value.text in lines[value.line - 1] for _, value in document.root.scalars())


def _parameters(root: Message) -> list[tuple[str, str]]:
    found = []
    for entry in root.messages("parameters"):
        key, value = entry.value("key"), entry.message("value")
        text = value.value("string_value") if value else None
        assert key is not None
        assert text is not None
        found.append((key.text, text.text))
    return found
