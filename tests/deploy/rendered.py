"""The chart as Helm's own engine renders it, and ways to look at what came out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "phalanx"
RELEASE = "phalanx"
_COMMENT_LINE = re.compile(r"^#.*$", re.MULTILINE)

Document = dict[str, Any]

GPU_GROUPS = [
    {"name": "h100", "replicas": 4, "cpus": 96, "memory": "1Ti", "gpus": 8, "gpuType": "h100", "sharedMemory": "64Gi"},
    {
        "name": "a100",
        "replicas": 0,
        "cpus": 64,
        "memory": "512Gi",
        "gpus": 4,
        "gpuType": "a100-80g",
        "labels": {"rack": "r7"},
        "nodeSelector": {"pool": "a100"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "runtimeClassName": "nvidia",
    },
]

# What an operator may choose, each by its name in the tests' output.
VARIATIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no Ray": {"ray": {"enabled": False}, "agent": {"enabled": False}},
    "a Ray cluster that others run": {
        "ray": {"enabled": False, "tokenSecret": "their-ray"},
        "agent": {"rayAddress": "ray.example:6379", "gpuType": "h100", "allowMounts": ["/datasets:ro", "/scratch"]},
    },
    "only a Ray cluster": {
        "controlPlane": {"enabled": False},
        "agent": {"serverUrl": "https://phalanx.example"},
        "tokens": {"clusterSecret": "west-token"},
    },
    "own Secrets and claims": {
        "tokens": {"adminSecret": "my-admin", "clusterSecret": "my-cluster"},
        "ray": {"tokenSecret": "my-ray"},
        "storage": {"existingClaim": "my-storage"},
        "checkpoints": {"existingClaim": "my-checkpoints"},
        "images": {"pullSecrets": ["registry"]},
    },
    "object storage": {
        "storage": {"url": "s3://bucket/phalanx"},
        "checkpoints": {"url": "s3://bucket/checkpoints"},
        "controlPlane": {"extraEnv": [{"name": "AWS_REGION", "value": "eu-north-1"}]},
    },
    "two GPU types": {"ray": {"workerGroups": GPU_GROUPS, "env": [{"name": "NCCL_DEBUG", "value": "WARN"}]}},
    "ingress": {"server": {"ingress": {"enabled": True, "host": "phalanx.example", "tlsSecret": "tls"}}},
    "Redis": {
        "ray": {
            "gcsFaultTolerance": {"redisAddress": "redis:6379", "redisPasswordSecret": {"name": "redis", "key": "word"}}
        }
    },
    "restricted workers": {"ray": {"ownUsers": False}, "networkPolicy": {"enabled": False}},
    "settings and policy": {
        "controlPlane": {
            "settings": {"fence_s": 90, "metrics_public": True, "webhook_url": "https://hook.example/"},
            "policy": {"share_nodes": "tenant"},
        },
        "networkPolicy": {"serverFrom": [{"namespaceSelector": {"matchLabels": {"team": "web"}}}]},
        "server": {"replicas": 1, "nodeSelector": {"pool": "system"}},
    },
    "metrics of the scheduler": {
        "scheduler": {"metricsPort": 9464},
        "networkPolicy": {"metricsFrom": [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}]},
        "agent": {"environmentsDisk": "12.5GiB"},
    },
}


class _NoDuplicates(yaml.CSafeLoader):
    """Kubernetes refuses a key that stands twice; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"a key stands twice: {keys}"
        return super().construct_mapping(node, deep)


def render(values: dict[str, Any]) -> list[Document]:
    """Every document of a first installation. Raises HelmError where the values are refused."""
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        files = chart.render(values, name=RELEASE, namespace="phalanx")
    texts = [text for path, text in files.items() if path.endswith(".yaml")]
    documents = [document for text in texts for document in yaml.load_all(text, _NoDuplicates)]
    return [document for document in documents if document is not None]


def notes(values: dict[str, Any]) -> str:
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name=RELEASE, namespace="phalanx")
    return next(text for path, text in files.items() if path.endswith("NOTES.txt"))


def of_kind(documents: list[Document], kind: str) -> list[Document]:
    return [document for document in documents if document["kind"] == kind]


def named(documents: list[Document], kind: str, name: str) -> Document:
    return next(document for document in of_kind(documents, kind) if document["metadata"]["name"] == name)


def pod_templates(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(component, Pod template) of every workload, those inside a RayCluster included."""
    for document in documents:
        if document["kind"] in ("Deployment", "Job"):
            templates = [document["spec"]["template"]]
        elif document["kind"] == "RayCluster":
            spec = document["spec"]
            templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
        else:
            continue
        for template in templates:
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template


def containers(template: Document) -> list[Document]:
    return [*template["spec"].get("initContainers", ()), *template["spec"]["containers"]]
