"""`trtbuild package --k8s`: Kubernetes manifests of packaged engines, one file for each.

A Deployment, a Service and a ServiceMonitor; a LeaderWorkerSet (leaderworkerset.x-k8s.io/v1) in the Deployment's place
where the layout has more ranks than a node has GPUs. The pod runs `trtbuild serve` from the image of
triton_repo/Dockerfile over a volume that holds triton_repo/models.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild import __version__
from trtbuild.engines.passport import Passport
from trtbuild.errors import refuse_all
from trtbuild.triton_repo.kubernetes_sizes import PodSizes
from trtbuild.triton_repo.model_config import WorkerSettings
from trtbuild.workspace import write_atomic

Manifest = dict[str, Any]

IMAGE = f"trtbuild:{__version__}"
CLAIM = "trtbuild-models"
PORTS = {"openai": 9000, "http": 8000, "grpc": 8001, "metrics": 8002}
# The user of NGC's Triton image.
USER = 1000
# A name of at most 63 characters is left room for what a Deployment and a LeaderWorkerSet append.
_MAX_NAME = 45
EXIT_TIMEOUT_S = 60
_PRE_STOP_S = 5
# `serve` gives Triton and the front end a few seconds each beyond the exit timeout.
_GRACE_S = _PRE_STOP_S + EXIT_TIMEOUT_S + 30
_PROBE_PERIOD_S = 10
# As long as `serve` waits for Triton's models.
_LOAD_TIMEOUT_S = 1800
_NODE_NOTE = "ranks on several nodes: it does not run yet, since trtbuild starts every rank of an engine on one machine"
_PIPELINE_NOTE = "pipeline stages (--pp) run in the reference executor only; the GPUs that they ask for would be idle"
_WORKER_MESSAGE = "trtbuild starts every rank of an engine on one machine; ranks on other nodes cannot join it yet"


@dataclass(frozen=True)
class KubernetesOptions:
    """image: of triton_repo/Dockerfile. claim: the volume claim that holds the model repository.

    no_gpu: the reference executor on CPUs answers, in one pod whatever the layout.
    """

    image: str = IMAGE
    claim: str = CLAIM
    gpus_per_node: int = 8
    no_gpu: bool = False


@dataclass(frozen=True)
class Deployed:
    """An engine's manifests in the order in which they are applied; `notes` are what their reader must know."""

    name: str
    manifests: list[Manifest]
    notes: list[str]

    def kinds(self) -> str:
        return ", ".join(manifest["kind"] for manifest in self.manifests)


def build_manifests(
    passports: Sequence[Passport],
    settings: WorkerSettings,
    options: KubernetesOptions,
    *,
    alias: str | None = None,
) -> list[Deployed]:
    """Manifests of every engine; raises `Refused` with every problem found, before anything is written."""
    names = {passport.name: object_name(passport.name) for passport in passports}
    refuse_all("package --k8s", _problems(passports, names, options))
    return [_deployed(passport, names[passport.name], settings, options, alias) for passport in passports]


def write_manifests(deployed: Sequence[Deployed], directory: Path) -> list[Path]:
    """One YAML file for each engine, each written whole; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{one.name}.yaml" for one in deployed]
    for one, path in zip(deployed, paths, strict=True):
        write_atomic(path, to_yaml(one).encode())
    return paths


def to_yaml(deployed: Deployed) -> str:
    """The documents, after the notes as comments."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    head = [f"Written by trtbuild {__version__} (package --k8s); packaging again replaces this file.", *deployed.notes]
    body = yaml.dump_all(deployed.manifests, Dumper=Dumper, sort_keys=False, explicit_start=True, width=1000)
    return "".join(f"# {line}\n" for line in head) + body


def object_name(name: str) -> str:
    """The engine's NAME as a DNS label; a digest keeps apart what would be cut off."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")
    if not label[:1].isalpha():
        label = f"engine-{label}".rstrip("-")
    if len(label) <= _MAX_NAME:
        return label
    return f"{label[: _MAX_NAME - 9].rstrip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _problems(passports: Sequence[Passport], names: Mapping[str, str], options: KubernetesOptions) -> list[str]:
    problems: list[str] = []
    for passport in passports:
        name, ranks, gpus = passport.name, passport.layout.world_size, options.gpus_per_node
        twins = [other for other in names if other != name and names[other] == names[name]]
        if twins:
            problems.append(
                f"{name} and {twins[0]} would both be {names[name]} in the cluster; compile one with --name"
            )
        if not options.no_gpu and ranks > gpus and ranks % gpus:
            allowed = ", ".join(str(n) for n in range(1, ranks) if ranks % n == 0)
            problems.append(f"{name}: --gpus-per-node {gpus} does not divide its {ranks} ranks; choose {allowed}")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", options.claim):
        problems.append(f"--k8s-claim {options.claim!r}: not a name of Kubernetes (a-z, 0-9, '-' and '.')")
    if not re.fullmatch(r"\S+", options.image):
        problems.append(f"--k8s-image {options.image!r}: not the name of an image")
    return problems


def _deployed(
    passport: Passport, name: str, settings: WorkerSettings, options: KubernetesOptions, alias: str | None
) -> Deployed:
    sizes = PodSizes.of(passport, settings, options.gpus_per_node, options.no_gpu)
    models = [passport.name, *([alias] if alias else [])]
    pod = _pod_spec(_serving_container(models, settings, options, sizes), options, sizes)
    template = {"metadata": {"labels": _labels(name) | _role("server"), "annotations": _scraped(sizes)}, "spec": pod}
    if sizes.num_nodes == 1:
        workload = _deployment(name, template)
    else:
        workload = _leader_worker_set(name, template, options, sizes)
    manifests = [workload, _service(name), _service_monitor(name)]
    return Deployed(name, manifests, _notes(passport, sizes))


def _notes(passport: Passport, sizes: PodSizes) -> list[str]:
    notes = [f"{passport.name}: {sizes.describe()}"]
    targets = passport.data.get("targets") or []
    if sizes.gpus and targets:
        notes.append(f"its plans run on {', '.join(targets)}; elsewhere the reference executor (PyTorch) answers")
    if not sizes.gpus:
        notes.append("no GPU is asked for: the reference executor (PyTorch) answers")
    if sizes.gpus and passport.layout.pp > 1:
        notes.append(f"WARNING: {_PIPELINE_NOTE}")
    if sizes.num_nodes > 1:
        notes.append(f"WARNING: {_NODE_NOTE}")
    return notes


def _deployment(name: str, template: Manifest) -> Manifest:
    spec = {
        "replicas": 1,
        "progressDeadlineSeconds": _LOAD_TIMEOUT_S + 300,
        "selector": {"matchLabels": _selector(name)},
        "template": template,
    }
    return _object("apps/v1", "Deployment", name, name, spec)


def _leader_worker_set(name: str, leader: Manifest, options: KubernetesOptions, sizes: PodSizes) -> Manifest:
    """Its controller makes a headless Service of its own name, so it cannot have our Service's."""
    worker = {
        "name": "ranks",
        "image": options.image,
        # It fails, and says why, rather than hold a node's GPUs for a leader that nothing can join.
        "command": ["/bin/sh", "-c", f"echo '{_WORKER_MESSAGE}' >&2; exit 1"],
        "resources": sizes.resources(),
        "env": _environment(),
        "securityContext": _container_security(),
        "volumeMounts": _mounts(),
    }
    spec = {
        "replicas": 1,
        "startupPolicy": "LeaderCreated",
        "leaderWorkerTemplate": {
            "size": sizes.num_nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": leader,
            "workerTemplate": {
                "metadata": {"labels": _labels(name) | _role("ranks")},
                "spec": _pod_spec(worker, options, sizes),
            },
        },
    }
    return _object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", f"{name}-ranks", name, spec)


def _service(name: str) -> Manifest:
    ports = [{"name": port, "port": number, "targetPort": port} for port, number in PORTS.items()]
    spec = {"type": "ClusterIP", "selector": _selector(name) | _role("server"), "ports": ports}
    return _object("v1", "Service", name, name, spec)


def _service_monitor(name: str) -> Manifest:
    endpoints = [{"port": port, "path": "/metrics", "interval": "15s"} for port in ("metrics", "openai")]
    spec = {
        "jobLabel": "app.kubernetes.io/instance",
        "selector": {"matchLabels": _selector(name)},
        "endpoints": endpoints,
    }
    return _object("monitoring.coreos.com/v1", "ServiceMonitor", name, name, spec)


def _object(version: str, kind: str, name: str, instance: str, spec: Manifest) -> Manifest:
    metadata = {"name": name, "labels": _labels(instance)}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _serving_container(
    models: Sequence[str], settings: WorkerSettings, options: KubernetesOptions, sizes: PodSizes
) -> Manifest:
    arguments = ["serve", *models, "--repository", "/models", "--host", "0.0.0.0", "--log-format", "json"]
    arguments += ["--exit-timeout", str(EXIT_TIMEOUT_S)]
    for port, number in PORTS.items():
        arguments += [f"--{port}-port", str(number)]
    return {
        "name": "serve",
        "image": options.image,
        "args": arguments,
        "env": _environment(),
        "ports": [{"name": port, "containerPort": number} for port, number in PORTS.items()],
        "resources": sizes.resources(settings.threads),
        # Loading takes as long as the weights do; the front end listens once Triton is ready.
        "startupProbe": _probe("/v2/health/ready", "http", _LOAD_TIMEOUT_S // _PROBE_PERIOD_S),
        "readinessProbe": _probe("/health/ready", "openai", 2),
        # Not Triton's: `serve` starts a killed Triton again by itself, and ends where that does not help.
        "livenessProbe": _probe("/health/live", "openai", 6),
        # Endpoints forget the pod before it refuses requests.
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_PRE_STOP_S)]}}},
        "securityContext": _container_security(),
        "volumeMounts": _mounts(),
    }


def _probe(path: str, port: str, failures: int) -> Manifest:
    request = {"path": path, "port": port}
    return {"httpGet": request, "periodSeconds": _PROBE_PERIOD_S, "timeoutSeconds": 5, "failureThreshold": failures}


def _pod_spec(container: Manifest, options: KubernetesOptions, sizes: PodSizes) -> Manifest:
    volumes: list[Manifest] = [
        {"name": "models", "persistentVolumeClaim": {"claimName": options.claim, "readOnly": True}},
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": sizes.shm}},
        {"name": "cache", "emptyDir": {}},
        {"name": "tmp", "emptyDir": {}},
    ]
    spec: Manifest = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": volumes,
    }
    if sizes.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return spec


def _mounts() -> list[Manifest]:
    models = {"name": "models", "mountPath": "/models", "readOnly": True}
    writable = {"shm": "/dev/shm", "cache": "/cache", "tmp": "/tmp"}
    return [models, *({"name": name, "mountPath": path} for name, path in writable.items())]


def _environment() -> list[Manifest]:
    """Kernels that TensorRT-RTX compiles just in time are kept in the cache volume: /models cannot be written to."""
    return [{"name": "HOME", "value": "/cache"}, {"name": "XDG_CACHE_HOME", "value": "/cache"}]


def _container_security() -> Manifest:
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def _selector(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "trtbuild", "app.kubernetes.io/instance": name}


def _role(role: str) -> dict[str, str]:
    return {"app.kubernetes.io/component": role}


def _labels(name: str) -> dict[str, str]:
    version = re.sub(r"[^A-Za-z0-9.-]+", "-", __version__).strip(".-")[:63]
    return _selector(name) | {"app.kubernetes.io/version": version, "app.kubernetes.io/managed-by": "trtbuild"}


def _scraped(sizes: PodSizes) -> dict[str, str]:
    """For clusters that find pods by annotation; those with the Prometheus operator use the ServiceMonitor."""
    prometheus = {"scrape": "true", "port": str(PORTS["metrics"]), "path": "/metrics"}
    return {f"prometheus.io/{key}": value for key, value in prometheus.items()} | sizes.annotations()
