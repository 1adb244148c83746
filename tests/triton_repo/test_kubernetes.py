"""Manifests of engines of known models, against the published schemas and against the arithmetic of the models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner
from custom_resources import LEADER_WORKER_SET, SERVICE_MONITOR

from trtbuild.cli import main
from trtbuild.engines.job import Job
from trtbuild.engines.passport import FORMAT_VERSION, Passport
from trtbuild.engines.recipe import Recipe
from trtbuild.errors import Refused
from trtbuild.triton_repo.kubernetes import (
    EXIT_TIMEOUT_S,
    Deployed,
    KubernetesOptions,
    build_manifests,
    object_name,
    to_yaml,
    write_manifests,
)
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.workspace import write_json

Manifest = dict[str, Any]

CUSTOM = {"ServiceMonitor": SERVICE_MONITOR, "LeaderWorkerSet": LEADER_WORKER_SET}
# The oldest release that is still supported somewhere, and the newest that kubernetes-validate has.
VERSIONS = ("1.28", kubernetes_validate.latest_version())
MIXTRAL_PARAMETERS = 46.7e9
# Every rank has the whole embedding, 32000 rows of 4096.
MIXTRAL_EMBEDDING_BYTES = 32000 * 4096 * 2
# Keys and values of 8 heads of 128 in 32 layers, 16 bit.
MIXTRAL_CACHE_BYTES = 2 * 8 * 128 * 32 * 2
MIB, GIB = 2**20, 2**30


@cache
def passport(model: str = "mixtral", name: str | None = None, **fields: object) -> Passport:
    """Of an engine that was never compiled: what manifests are made from is known without weights."""
    job = Job.resolve(Recipe.create(model=model, plan_only=True, **fields), weights=False)
    data = {
        "format": FORMAT_VERSION,
        "name": name or job.recipe.engine_name,
        "model": job.config.to_dict(),
        "layout": asdict(job.layout),
        "precision": job.precision.to_dict(),
        "limits": asdict(job.limits),
        "targets": list(job.targets),
    }
    return Passport(Path("engines"), data)


def deployed(engine: Passport, settings: WorkerSettings | None = None, **options: Any) -> Deployed:
    alias = options.pop("alias", None)
    return build_manifests([engine], settings or WorkerSettings(), KubernetesOptions(**options), alias=alias)[0]


def check(manifest: Manifest) -> None:
    """Raises ValidationError of the one or the other; pod templates inside a custom resource are checked too."""
    if manifest["kind"] not in CUSTOM:
        for version in VERSIONS:
            kubernetes_validate.validate(manifest, version, strict=True)
        return
    jsonschema.validate(manifest, CUSTOM[manifest["kind"]])
    templates = manifest["spec"].get("leaderWorkerTemplate", {})
    for name in ("leaderTemplate", "workerTemplate"):
        if name in templates:
            check({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": templates[name]})


def by_kind(found: Deployed) -> dict[str, Manifest]:
    return {manifest["kind"]: manifest for manifest in found.manifests}


def pod_of(manifest: Manifest, role: str = "leaderTemplate") -> Manifest:
    spec = manifest["spec"]
    return (spec["leaderWorkerTemplate"][role] if "leaderWorkerTemplate" in spec else spec["template"])["spec"]


def resources_of(manifest: Manifest) -> Manifest:
    return pod_of(manifest)["containers"][0]["resources"]


def mebibytes(quantity: str) -> int:
    assert quantity.endswith("Mi")
    return int(quantity[:-2])


@pytest.mark.parametrize(
    ("layout", "gpus", "kind", "size"),
    [
        ({"tp": 1}, "1", "Deployment", None),
        ({"tp": 8}, "8", "Deployment", None),
        ({"tp": 4, "pp": 2}, "8", "Deployment", None),
        ({"tp": 16}, "8", "LeaderWorkerSet", 2),
        ({"tp": 8, "pp": 4}, "8", "LeaderWorkerSet", 4),
    ],
)
def test_every_manifest_is_valid(layout: dict[str, int], gpus: str, kind: str, size: int | None) -> None:
    found = deployed(passport(**layout))
    documents = list(yaml.safe_load_all(to_yaml(found)))
    assert documents == found.manifests
    for document in documents:
        check(document)
    assert [document["kind"] for document in documents] == [kind, "Service", "ServiceMonitor"]
    workload = documents[0]
    assert resources_of(workload)["limits"]["nvidia.com/gpu"] == gpus
    assert workload["spec"].get("leaderWorkerTemplate", {}).get("size") == size


BREAKS: dict[str, Callable[[Manifest], Any]] = {
    "replicas as text": lambda m: m["spec"].update(replicas="one"),
    "a misspelt field of a container": lambda m: pod_of(m)["containers"][0].update(livenesProbe={}),
    "a container without a name": lambda m: pod_of(m)["containers"][0].pop("name"),
    "a port that is text": lambda m: pod_of(m)["containers"][0]["ports"][0].update(containerPort="http"),
    "a probe's period as text": lambda m: pod_of(m)["containers"][0]["startupProbe"].update(periodSeconds="10s"),
    "a pod without containers": lambda m: pod_of(m).pop("containers"),
    "a pod's security as a list": lambda m: pod_of(m).update(securityContext=[]),
}


@pytest.mark.parametrize("layout", [{"tp": 8}, {"tp": 16}], ids=["Deployment", "LeaderWorkerSet"])
@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_workload_is_not_valid(broken: str, layout: dict[str, int]) -> None:
    workload = copy.deepcopy(deployed(passport(**layout)).manifests[0])
    BREAKS[broken](workload)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(workload)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("LeaderWorkerSet", ["leaderWorkerTemplate", "size"], "2"),
        ("LeaderWorkerSet", ["leaderWorkerTemplate", "restartPolicy"], "Always"),
        ("LeaderWorkerSet", ["leaderWorkerTemplate", "workers"], {}),
        ("LeaderWorkerSet", ["startupPolicy"], "LeaderFirst"),
        ("ServiceMonitor", ["endpoints"], {}),
        ("ServiceMonitor", ["endpoint"], []),
        ("ServiceMonitor", ["selector"], {"app": "trtbuild"}),
        ("Service", ["ports"], [{"name": "http"}]),
    ],
)
def test_a_broken_resource_is_not_valid(kind: str, path: list[str], value: object) -> None:
    manifest = copy.deepcopy(by_kind(deployed(passport(tp=16)))[kind])
    place = manifest["spec"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_a_gpu_holds_its_share_of_the_weights_and_of_the_cache() -> None:
    for tp in (1, 8):
        engine = passport(tp=tp, max_batch_size=16)
        notes = by_kind(deployed(engine))["Deployment"]["spec"]["template"]["metadata"]["annotations"]
        weights = int(notes["trtbuild-weight-bytes-per-gpu"])
        shared_out = 2 * MIXTRAL_PARAMETERS - MIXTRAL_EMBEDDING_BYTES
        assert weights == pytest.approx(MIXTRAL_EMBEDDING_BYTES + shared_out / tp, rel=0.001)
        tokens = 16 * engine.limits.cache_capacity
        assert int(notes["trtbuild-kv-cache-bytes-per-gpu"]) == MIXTRAL_CACHE_BYTES * tokens // tp
    slots = by_kind(deployed(engine, WorkerSettings(slots=4)))["Deployment"]["spec"]["template"]["metadata"]
    assert int(slots["annotations"]["trtbuild-kv-cache-bytes-per-gpu"]) == MIXTRAL_CACHE_BYTES * tokens // tp // 4


def test_on_gpus_memory_is_for_processes_and_the_limit_leaves_room_for_the_files() -> None:
    one, eight = (resources_of(deployed(passport(tp=tp)).manifests[0]) for tp in (1, 8))
    assert mebibytes(eight["requests"]["memory"]) - mebibytes(one["requests"]["memory"]) == 7 * 3 * 1024
    room = mebibytes(eight["limits"]["memory"]) - mebibytes(eight["requests"]["memory"])
    assert room * MIB == pytest.approx(2 * MIXTRAL_PARAMETERS + 7 * MIXTRAL_EMBEDDING_BYTES, rel=0.001)
    assert eight["requests"]["nvidia.com/gpu"] == eight["limits"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("layout", [{"tp": 1}, {"tp": 16}])
def test_without_gpus_one_pod_holds_the_whole_model(layout: dict[str, int]) -> None:
    found = deployed(passport(precision="fp8", **layout), WorkerSettings(dtype="float32", threads=6), no_gpu=True)
    workload = found.manifests[0]
    check(workload)
    asked = resources_of(workload)
    assert workload["kind"] == "Deployment"
    assert "nvidia.com/gpu" not in str(workload)
    assert asked["requests"]["cpu"] == "6"
    limits = passport(precision="fp8", **layout).limits
    cache = 2 * MIXTRAL_CACHE_BYTES * limits.cache_capacity * limits.max_batch_size
    # fp8 is unpacked to float32, as the reference executor has it.
    assert mebibytes(asked["requests"]["memory"]) * MIB == pytest.approx(
        4 * MIXTRAL_PARAMETERS + cache * max(1, layout["tp"] / 8) + 7 * GIB, rel=0.02
    )
    assert asked["limits"]["memory"] == asked["requests"]["memory"]


def test_the_pod_is_told_apart_and_found() -> None:
    """The Service finds what answers, and of a LeaderWorkerSet that is its leader alone."""
    for layout in ({"tp": 8}, {"tp": 16}):
        found = by_kind(deployed(passport(**layout)))
        spec = next(iter(found.values()))["spec"]
        group = spec.get("leaderWorkerTemplate")
        leader = (group["leaderTemplate"] if group else spec["template"])["metadata"]["labels"]
        selector = found["Service"]["spec"]["selector"].items()
        assert selector <= leader.items()
        if group:
            assert not selector <= group["workerTemplate"]["metadata"]["labels"].items()
            # Its controller makes a headless Service of its own name.
            assert found["LeaderWorkerSet"]["metadata"]["name"] != found["Service"]["metadata"]["name"]
        else:
            assert spec["selector"]["matchLabels"].items() <= leader.items()
        monitor = found["ServiceMonitor"]["spec"]
        assert monitor["selector"]["matchLabels"].items() <= found["Service"]["metadata"]["labels"].items()
        ports = {port["name"] for port in found["Service"]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= ports


def test_the_pod_serves_its_engine_and_ends_in_order() -> None:
    pod = pod_of(deployed(passport(tp=1), alias="ensemble", image="registry.example/t:1", claim="here").manifests[0])
    container = pod["containers"][0]
    assert container["image"] == "registry.example/t:1"
    assert container["args"][:3] == ["serve", "mixtral-bf16-tp1", "ensemble"]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > EXIT_TIMEOUT_S + pause
    named = {port["name"] for port in container["ports"]}
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe")} <= named
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["models"]["persistentVolumeClaim"] == {"claimName": "here", "readOnly": True}
    assert mounts["/models"]["readOnly"] is True
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"
    assert pod["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_serve_takes_the_arguments() -> None:
    """Up to the repository, which is not there: an unknown option ends with click's 2."""
    arguments = pod_of(deployed(passport(tp=1)).manifests[0])["containers"][0]["args"]
    here = CliRunner().invoke(main, [*arguments, "--tritonserver", "/bin/true"])
    assert here.exit_code == 3
    assert "/models" in here.output


def test_what_does_not_run_is_said() -> None:
    assert not any("WARNING" in note for note in deployed(passport(tp=8)).notes)
    nodes = deployed(passport(tp=16))
    assert "# WARNING: ranks on several nodes: it does not run yet" in to_yaml(nodes)
    worker = pod_of(nodes.manifests[0], "workerTemplate")["containers"][0]
    assert "exit 1" in worker["command"][-1]
    assert any("pipeline stages" in note for note in deployed(passport(tp=4, pp=2)).notes)


def test_layouts_that_do_not_divide_are_refused_together() -> None:
    engines = [passport(tp=8), passport(tp=16)]
    with pytest.raises(Refused, match="does not divide its 8 ranks; choose 1, 2, 4") as refused:
        build_manifests(engines, WorkerSettings(), KubernetesOptions(gpus_per_node=3, claim="My Claim"))
    assert "does not divide its 16 ranks" in refused.value.message
    assert "--k8s-claim 'My Claim'" in refused.value.message


def test_names_become_dns_labels_and_do_not_meet() -> None:
    assert object_name("Mixtral_8x7B.v0.1") == "mixtral-8x7b-v0-1"
    assert object_name("7b-tp1") == "engine-7b-tp1"
    long = ["m" * 80 + end for end in "ab"]
    assert len({object_name(name) for name in long}) == 2
    assert all(len(object_name(name)) <= 45 for name in long)
    engines = [passport(name="a_b", tp=1), passport(name="a.b", tp=1)]
    with pytest.raises(Refused, match="would both be a-b"):
        build_manifests(engines, WorkerSettings(), KubernetesOptions())
    check(deployed(passport(name="X" * 120, tp=16)).manifests[0])


def test_files_are_replaced(tmp_path: Path) -> None:
    first = write_manifests([deployed(passport(tp=1))], tmp_path / "k8s")
    again = write_manifests([deployed(passport(tp=1), image="other:2")], tmp_path / "k8s")
    assert first == again == [tmp_path / "k8s" / "mixtral-bf16-tp1.yaml"]
    assert "image: other:2" in again[0].read_text()
    assert list((tmp_path / "k8s").iterdir()) == again


def test_the_command_refuses_before_it_packages(tmp_path: Path) -> None:
    engine = passport(tp=8)
    (tmp_path / "engines" / engine.name).mkdir(parents=True)
    write_json(tmp_path / "engines" / engine.name / "engine.json", engine.data | {"builder": {"name": "tensorrt-rtx"}})
    command = ["package", engine.name, "--workspace", str(tmp_path), "--no-check"]
    refused = CliRunner().invoke(main, [*command, "--k8s", str(tmp_path / "k8s"), "--gpus-per-node", "3"])
    assert refused.exit_code == 3
    assert "--gpus-per-node 3" in refused.output
    alone = CliRunner().invoke(main, [*command, "--k8s-no-gpu"])
    assert alone.exit_code == 2
    assert "--k8s DIR" in alone.output
    assert not (tmp_path / "k8s").exists()
