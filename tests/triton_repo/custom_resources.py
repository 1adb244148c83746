"""JSON schemas of the custom resources that we write: the parts that we use, and nothing else is let through.

Names, types, patterns and required fields are those of the CRDs' openAPIV3Schema, at these commits:
ServiceMonitor: prometheus-operator/prometheus-operator 01b1a0ea3113af46d69ae3d2ee717bd10b2de1d1,
  example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml (operator 0.84.1)
LeaderWorkerSet: kubernetes-sigs/lws 103a98aa8a6bb5682d96e1f10f3956f791f36e86,
  config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml
A cluster drops fields that a CRD does not have; here they are errors. Pod templates inside are Kubernetes' own and are
checked against its schema apart.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def closed(required: list[str], **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


STRING: Schema = {"type": "string"}
STRINGS: Schema = {"type": "array", "items": STRING}
INT32: Schema = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
INT_OR_STRING: Schema = {"anyOf": [{"type": "integer"}, STRING]}
STRING_MAP: Schema = {"type": "object", "additionalProperties": STRING}
METADATA = closed(["name"], name=STRING, labels=STRING_MAP, annotations=STRING_MAP)
DURATION: Schema = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?(([0-9]+)ms)?)$",
}


def resource(version: str, kind: str, spec: Schema) -> Schema:
    return closed(
        ["apiVersion", "kind", "metadata", "spec"],
        apiVersion={"const": version},
        kind={"const": kind},
        metadata=METADATA,
        spec=spec,
    )


SERVICE_MONITOR = resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    closed(
        ["endpoints", "selector"],
        jobLabel=STRING,
        targetLabels=STRINGS,
        podTargetLabels=STRINGS,
        namespaceSelector=closed([], any={"type": "boolean"}, matchNames=STRINGS),
        selector=closed([], matchLabels=STRING_MAP),
        endpoints={
            "type": "array",
            "items": closed(
                [],
                port=STRING,
                path=STRING,
                scheme={"enum": ["http", "https"]},
                interval=DURATION,
                scrapeTimeout=DURATION,
                honorLabels={"type": "boolean"},
            ),
        },
    ),
)

_POD_TEMPLATE = closed(
    [],
    metadata=closed([], labels=STRING_MAP, annotations=STRING_MAP),
    spec={"type": "object", "required": ["containers"]},
)
LEADER_WORKER_SET = resource(
    "leaderworkerset.x-k8s.io/v1",
    "LeaderWorkerSet",
    closed(
        ["leaderWorkerTemplate"],
        replicas=INT32,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        networkConfig=closed(["subdomainPolicy"], subdomainPolicy=STRING),
        rolloutStrategy=closed(
            ["type"],
            type={"enum": ["RollingUpdate"]},
            rollingUpdateConfiguration=closed([], maxSurge=INT_OR_STRING, maxUnavailable=INT_OR_STRING),
        ),
        leaderWorkerTemplate=closed(
            ["workerTemplate"],
            size=INT32,
            restartPolicy={"enum": ["Default", "RecreateGroupOnPodRestart"]},
            leaderTemplate=_POD_TEMPLATE,
            workerTemplate=_POD_TEMPLATE,
        ),
    ),
)
