"""The chart by itself: it is valid Kubernetes, whatever an operator chooses, and safe in what it asks for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml
from phalanx_server.store.tokens import given
from rendered import CHART, ROOT, VARIATIONS, Document, containers, named, of_kind, pod_templates, render

CRD = ROOT.parent / "shared" / "k8s" / "crds" / "ray.io_rayclusters.yaml"
KUBERNETES = "1.37"
WORKER_CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "FOWNER", "KILL", "SETGID", "SETUID", "SYS_PTRACE"]


@pytest.mark.parametrize("name", VARIATIONS)
def test_helm_finds_no_fault(name: str) -> None:
    report = helm_python.lint(CHART, VARIATIONS[name], strict=True, kube_version=f"v{KUBERNETES}.0")
    assert report["errors"] == []
    assert [found for found in report["messages"] if found["severity"] > 1] == []


def test_every_document_is_valid_kubernetes(charts: dict[str, list[Document]], monkeypatch: pytest.MonkeyPatch) -> None:
    schemas = kubernetes_validate.utils.schema_contents
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cache(schemas))  # a tenth of a second each
    distinct = {json.dumps(document): document for documents in charts.values() for document in documents}
    for document in distinct.values():
        if document["kind"] != "RayCluster":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
    for _, template in pod_templates(of_kind(list(distinct.values()), "RayCluster")):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.mark.skipif(not CRD.is_file(), reason="KubeRay's CRDs are not in ../shared/k8s/crds")
def test_every_ray_cluster_is_what_kuberay_takes(charts: dict[str, list[Document]]) -> None:
    crd = yaml.load(CRD.read_text(), yaml.CSafeLoader)
    schema = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")["schema"]
    validator = jsonschema.Draft7Validator(closed(schema["openAPIV3Schema"]))
    clusters = [cluster for documents in charts.values() for cluster in of_kind(documents, "RayCluster")]
    assert clusters
    for cluster in clusters:
        assert [error.message for error in validator.iter_errors(cluster)] == []


def closed(schema: Any) -> Any:
    """The schema, refusing fields that it does not know, as Kubernetes does when asked to be strict."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(value) for key, value in schema.items()}
    knows = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if knows and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        open_ended = set(schema["properties"]) == {"apiVersion", "kind", "metadata", "spec", "status"}
        inner["additionalProperties"] = open_ended
    if schema.get("type") == "object" and "properties" not in schema:  # metadata, whose fields a CRD does not list
        inner.pop("additionalProperties", None)
    return inner


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("values", "named_in_the_error"),
    [
        ({"sever": {}}, "sever"),
        ({"server": {"replica": 3}}, "replica"),
        ({"server": {"replicas": 0}}, "replicas"),
        ({"server": {"replicas": "two"}}, "replicas"),
        ({"controlPlane": {"settings": {"fence": 9}}}, "fence"),
        ({"controlPlane": {"settings": {"retain_logs_days": 1}}}, "retain_logs_days"),
        ({"controlPlane": {"settings": {"retain_outputs_days": 0.5}}}, "retain_outputs_days"),
        ({"ray": {"workerGroups": [{"name": "x", "replicas": 1, "cpus": 1}]}}, "memory"),
        ({"ray": {"workerGroups": [{"name": "x", "replicas": 1, "cpus": 1, "memory": "8GiB"}]}}, "memory"),
        ({"ray": {"workerGroups": [{"name": "A_1", "replicas": 1, "cpus": 1, "memory": "8Gi"}]}}, "name"),
        ({"ray": {"upgradeStrategy": "Rolling"}}, "upgradeStrategy"),
        ({"agent": {"gpuType": "H100; reboot"}}, "gpuType"),
        ({"checkpoints": {"path": "checkpoints"}}, "path"),
        ({"database": {"existingSecret": ""}}, "existingSecret"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], named_in_the_error: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=named_in_the_error):
        render(values)


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({"ray": {"enabled": False}}, "agent.rayAddress"),
        ({"ray": {"enabled": False}, "agent": {"rayAddress": "ray:6379"}}, "ray.tokenSecret"),
        ({"controlPlane": {"enabled": False}}, "agent.serverUrl"),
        ({"controlPlane": {"enabled": False}, "agent": {"serverUrl": "https://x"}}, "tokens.clusterSecret"),
        ({"server": {"ingress": {"enabled": True}}}, "server.ingress.host"),
    ],
)
def test_values_that_need_another_say_which(values: dict[str, Any], needed: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=needed):
        render(values)


def test_the_schema_knows_every_value_of_the_file() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(schema["properties"]) == {*values, "global"}


# ------------------------------------------------------------------ tokens


def test_the_first_tokens_have_the_form_that_the_server_takes(default: list[Document]) -> None:
    secrets = {secret["metadata"]["name"]: secret for secret in of_kind(default, "Secret")}
    assert set(secrets) == {"phalanx-admin-token", "phalanx-cluster-token", "phalanx-ray-token"}
    admin, cluster = (given(secrets[f"phalanx-{kind}-token"]["stringData"]["token"]) for kind in ("admin", "cluster"))
    assert admin.id.version == cluster.id.version == 7
    assert admin.hash != cluster.hash
    assert len(secrets["phalanx-ray-token"]["stringData"]["auth_token"]) == 43


def test_tokens_are_there_before_the_migration_and_stay_when_the_release_goes(default: list[Document]) -> None:
    migration = named(default, "Job", "phalanx-migrate")["metadata"]["annotations"]
    for secret in of_kind(default, "Secret"):
        annotations = secret["metadata"]["annotations"]
        assert annotations["helm.sh/hook"] == migration["helm.sh/hook"] == "pre-install,pre-upgrade"
        assert int(annotations["helm.sh/hook-weight"]) < int(migration["helm.sh/hook-weight"])
        assert "helm.sh/hook-delete-policy" not in annotations


def test_given_secrets_leave_none_to_make(charts: dict[str, list[Document]]) -> None:
    assert of_kind(charts["own Secrets and claims"], "Secret") == []
    assert of_kind(charts["own Secrets and claims"], "PersistentVolumeClaim") == []


def test_claims_outlive_the_release(default: list[Document]) -> None:
    claims = of_kind(default, "PersistentVolumeClaim")
    assert len(claims) == 2
    assert all(claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for claim in claims)


# ------------------------------------------------------------------ references


def test_what_a_pod_refers_to_is_made_here_or_was_named_by_the_operator(documents: list[Document]) -> None:
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    named_by_operator = {"phalanx-database", "my-admin", "my-cluster", "my-ray", "their-ray", "west-token"}
    named_by_operator |= {"my-storage", "my-checkpoints", "registry"}
    for component, template in pod_templates(documents):
        for kind, name in references(template):
            assert (kind, name) in made or name in named_by_operator, f"{component} needs {kind} {name}"


def references(template: Document) -> list[tuple[str, str]]:
    spec = template["spec"]
    found = [("ServiceAccount", spec["serviceAccountName"])] if "serviceAccountName" in spec else []
    for volume in spec["volumes"]:
        found += [("Secret", volume["secret"]["secretName"])] if "secret" in volume else []
        found += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
        claim = volume.get("persistentVolumeClaim")
        found += [("PersistentVolumeClaim", claim["claimName"])] if claim else []
    for container in containers(template):
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        for variable in container.get("env", ()):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            found += [("Secret", reference["name"])] if reference else []
    return found


def test_every_selector_selects_a_pod(documents: list[Document]) -> None:
    pods = [template["metadata"]["labels"] for _, template in pod_templates(documents)]
    selectors = [service["spec"]["selector"] for service in of_kind(documents, "Service")]
    selectors += [budget["spec"]["selector"]["matchLabels"] for budget in of_kind(documents, "PodDisruptionBudget")]
    selectors += [
        policy["spec"]["podSelector"]["matchLabels"]
        for policy in of_kind(documents, "NetworkPolicy")
        if "jobs" not in policy["metadata"]["name"]  # of workers, of which there may be none
    ]
    for selector in selectors:
        assert any(selector.items() <= labels.items() for labels in pods), selector


def test_labels_of_ray_pods_are_not_those_that_kuberay_selects_by(default: list[Document]) -> None:
    for component, template in pod_templates(of_kind(default, "RayCluster")):
        assert "app.kubernetes.io/name" not in template["metadata"]["labels"], component


# ------------------------------------------------------------------ security


def test_pods_are_restricted_but_for_workers(documents: list[Document]) -> None:
    for component, template in pod_templates(documents):
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"]["drop"] == ["ALL"]
            assert "memory" in container["resources"]["limits"]
            if component != "ray-worker":
                assert spec["securityContext"]["runAsNonRoot"] is True
                assert "add" not in context["capabilities"]


def test_workers_are_root_with_the_documented_capabilities(default: list[Document]) -> None:
    worker = dict(pod_templates(default))["ray-worker"]
    init, runner = containers(worker)
    assert runner["securityContext"]["runAsUser"] == 0
    assert runner["securityContext"]["capabilities"]["add"] == WORKER_CAPABILITIES
    assert "add" not in init["securityContext"]["capabilities"]
    documented = (ROOT / "docs" / "kubernetes.md").read_text()
    assert all(f"`{capability}`" in documented for capability in WORKER_CAPABILITIES)


def test_workers_without_own_users_are_restricted_too(charts: dict[str, list[Document]]) -> None:
    worker = dict(pod_templates(charts["restricted workers"]))["ray-worker"]
    assert worker["spec"]["securityContext"]["runAsNonRoot"] is True
    assert all("add" not in container["securityContext"]["capabilities"] for container in containers(worker))


def test_no_secret_stands_in_an_environment(documents: list[Document]) -> None:
    """A rank of another tenant, or `kubectl describe`, would read it there; the database's URL has no other way."""
    for _, template in pod_templates(documents):
        for variable in (variable for container in containers(template) for variable in container.get("env", ())):
            if "secretKeyRef" in variable.get("valueFrom", {}):
                assert variable["name"] == "PHALANX_DATABASE_URL"


def test_nobody_gets_into_the_cluster_and_jobs_do_not_reach_the_clouds_metadata(default: list[Document]) -> None:
    into = named(default, "NetworkPolicy", "phalanx-cluster")["spec"]
    assert into["policyTypes"] == ["Ingress"]
    assert into["ingress"] == [{"from": [{"podSelector": into["podSelector"]}]}]
    out = named(default, "NetworkPolicy", "phalanx-jobs")["spec"]
    blocks = [peer["ipBlock"] for rule in out["egress"] for peer in rule["to"] if "ipBlock" in peer]
    assert "169.254.169.254/32" in blocks[0]["except"]


def test_the_scheduler_listens_only_where_it_has_a_port_for_metrics(charts: dict[str, list[Document]]) -> None:
    deployment = named(charts["defaults"], "Deployment", "phalanx-scheduler")["spec"]["template"]
    assert "ports" not in deployment["spec"]["containers"][0] and "annotations" not in deployment["metadata"]
    assert "ingress" not in named(charts["defaults"], "NetworkPolicy", "phalanx-scheduler")["spec"]
    chart = charts["metrics of the scheduler"]
    asked = named(chart, "Deployment", "phalanx-scheduler")["spec"]["template"]
    (container,) = asked["spec"]["containers"]
    assert container["args"] == ["scheduler", "--metrics-host", "0.0.0.0", "--metrics-port", "9464"]
    assert container["ports"] == [{"name": "metrics", "containerPort": 9464}]
    assert asked["metadata"]["annotations"] == {"prometheus.io/scrape": "true", "prometheus.io/port": "9464"}
    (rule,) = named(chart, "NetworkPolicy", "phalanx-scheduler")["spec"]["ingress"]
    assert rule["ports"] == [{"port": "metrics"}]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"team": "monitoring"}}}]


def test_nobody_reads_the_schedulers_metrics_unless_it_is_said_who() -> None:
    chart = render({"scheduler": {"metricsPort": 9464}})
    policy = named(chart, "NetworkPolicy", "phalanx-scheduler")["spec"]
    assert policy["policyTypes"] == ["Ingress"] and "ingress" not in policy


# ------------------------------------------------------------------ Ray


def test_worker_groups_carry_their_gpus_type_and_labels(charts: dict[str, list[Document]]) -> None:
    (cluster,) = of_kind(charts["two GPU types"], "RayCluster")
    h100, a100 = cluster["spec"]["workerGroupSpecs"]
    assert h100["labels"] == {"phalanx.io/gpu-type": "h100"}
    assert a100["labels"] == {"phalanx.io/gpu-type": "a100-80g", "rack": "r7"}
    assert h100["rayStartParams"]["num-gpus"] == "8" and a100["replicas"] == 0
    runner = h100["template"]["spec"]["containers"][0]
    assert runner["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in runner["env"]


def test_the_head_runs_no_ranks(default: list[Document]) -> None:
    (cluster,) = of_kind(default, "RayCluster")
    head = cluster["spec"]["headGroupSpec"]
    assert head["labels"] == {"phalanx.io/role": "head"}
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_redis_keeps_what_gcs_knows(charts: dict[str, list[Document]]) -> None:
    (cluster,) = of_kind(charts["Redis"], "RayCluster")
    password = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "word"}}}
    assert cluster["spec"]["gcsFaultToleranceOptions"] == {"redisAddress": "redis:6379", "redisPassword": password}
    assert "gcsFaultToleranceOptions" not in of_kind(charts["defaults"], "RayCluster")[0]["spec"]


def test_the_agent_is_alone(default: list[Document]) -> None:
    agent = named(default, "Deployment", "phalanx-agent")["spec"]
    assert agent["replicas"] == 1 and agent["strategy"] == {"type": "Recreate"}


def test_the_chart_has_the_version_of_the_code() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
    values = yaml.safe_load((Path(CHART) / "values.yaml").read_text())
    assert f'"ray[default]=={values["ray"]["version"]}"' in project
