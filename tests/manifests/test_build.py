"""Every overlay builds, is strictly valid against the schemas of Kubernetes, and has no dangling references."""

import json
import os
import subprocess
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.overlays import BUILDS, KUBECTL, ROOT, Object, build, containers, objects, of_kind, pods

KUEUE, TRAINER = (
    yaml.safe_load((ROOT / "tests" / "manifests" / f"{name}_schema.yaml").read_text()) for name in ("kueue", "trainer")
)
# Created by Kubeflow Pipelines, Kubernetes (DNS) and the profile controller.
EXTERNAL_NAMESPACES = {"kubeflow", "kube-system", "rlhf-team"}
EXTERNAL_OBJECTS = {("ConfigMap", "kfp-launcher"), ("Secret", "mlpipeline-minio-artifact")}
# The labels that the pipeline sets on its tasks.
TASK_LABELS = [
    {"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/egress": "hub", "kfp-rlhf/process-group": "true"},
    {"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/egress": "endpoint"},
]


def assert_valid(item: Object) -> None:
    """Validate strictly against the newest installed schema; a kind without a schema is an error."""
    if item["apiVersion"].startswith("kueue.x-k8s.io/"):
        jsonschema.validate(item, KUEUE[item["kind"]])
    elif item["apiVersion"].startswith("trainer.kubeflow.org/"):
        jsonschema.validate(item, TRAINER[item["kind"]])
        for job in item["spec"]["template"]["spec"]["replicatedJobs"]:
            assert_valid(
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": {"name": job["name"]},
                    "spec": job["template"]["spec"],
                }
            )
    else:
        _assert_valid_text(json.dumps(item, sort_keys=True))


@cache  # most objects are in several overlays
def _assert_valid_text(item: str) -> None:
    kubernetes_validate.validate(json.loads(item), kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", BUILDS)
def test_objects_match_the_schemas(name: str) -> None:
    for item in objects(name):
        assert_valid(item)


def test_unknown_fields_and_kinds_are_rejected() -> None:
    claim = of_kind("standalone+checkpoint-claim", "PersistentVolumeClaim")[0]
    with pytest.raises(kubernetes_validate.ValidationError):
        assert_valid({**claim, "spec": {**claim["spec"], "acessModes": []}})
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        assert_valid({**claim, "kind": "Cliam"})
    queue = of_kind("standalone+kueue", "LocalQueue")[0]
    with pytest.raises(jsonschema.ValidationError):
        assert_valid({**queue, "spec": {"clusterqueue": "rlhf"}})


def references_in(value: Any) -> set[tuple[str, str]]:
    """(kind, name) of every ConfigMap, Secret, claim and account that a pod refers to."""
    keys = {
        "configMapRef": ("ConfigMap", "name"),
        "configMapKeyRef": ("ConfigMap", "name"),
        "configMap": ("ConfigMap", "name"),
        "secretRef": ("Secret", "name"),
        "secretKeyRef": ("Secret", "name"),
        "secret": ("Secret", "secretName"),
        "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
    }
    if isinstance(value, list):
        return set().union(*map(references_in, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    references = {(kind, value[key][field]) for key, (kind, field) in keys.items() if key in value}
    if "serviceAccountName" in value:
        references.add(("ServiceAccount", value["serviceAccountName"]))
    return references.union(*map(references_in, value.values()))


@pytest.mark.parametrize("name", BUILDS)
def test_references_of_pods_exist(name: str) -> None:
    existing = {(o["metadata"].get("namespace"), o["kind"], o["metadata"]["name"]) for o in objects(name)}
    for owner, _, pod in pods(name):
        missing = {pair for pair in references_in(pod) if (owner["metadata"]["namespace"], *pair) not in existing}
        assert missing == set(), owner["metadata"]["name"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for container in containers(pod) for mount in container.get("volumeMounts", [])}
        assert mounted == volumes, owner["metadata"]["name"]


@pytest.mark.parametrize("name", BUILDS)
def test_references_of_roles_and_bindings_exist(name: str) -> None:
    existing = {(o["metadata"].get("namespace"), o["kind"], o["metadata"]["name"]) for o in objects(name)}
    kinds = {"configmaps": "ConfigMap", "secrets": "Secret"}
    for binding in of_kind(name, "RoleBinding"):
        for target in [binding["roleRef"], *binding["subjects"]]:
            assert (
                target.get("namespace", binding["metadata"]["namespace"]),
                target["kind"],
                target["name"],
            ) in existing
    for role in of_kind(name, "Role"):
        for rule in role["rules"]:
            for pair in [(kinds[r], n) for r in rule["resources"] if r in kinds for n in rule.get("resourceNames", [])]:
                assert pair in EXTERNAL_OBJECTS or (role["metadata"]["namespace"], *pair) in existing


def selects(selector: Object, labels: Object) -> bool:
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_match_pods(name: str) -> None:
    labels = [(owner["metadata"]["namespace"], meta["labels"]) for owner, meta, _ in pods(name)]
    accounts = of_kind(name, "ServiceAccount")
    run_namespace = next(a["metadata"]["namespace"] for a in accounts if a["metadata"]["name"] == "rlhf-runner")
    labels += [(run_namespace, task_labels) for task_labels in TASK_LABELS]
    namespaces = EXTERNAL_NAMESPACES | {item["metadata"]["name"] for item in of_kind(name, "Namespace")}

    def has_match(namespace: str, selector: Object) -> bool:
        return any(ns == namespace and selects(selector, pod_labels) for ns, pod_labels in labels)

    for service in of_kind(name, "Service"):
        assert has_match(service["metadata"]["namespace"], {"matchLabels": service["spec"]["selector"]})
    for policy in of_kind(name, "NetworkPolicy", "PodDisruptionBudget"):
        spec, own_namespace = policy["spec"], policy["metadata"]["namespace"]
        assert has_match(own_namespace, spec.get("podSelector", spec.get("selector"))), policy["metadata"]["name"]
        peers = [peer for rule in spec.get("ingress", []) for peer in rule["from"]]
        peers += [peer for rule in spec.get("egress", []) for peer in rule["to"]]
        for peer in peers:
            labels_of_namespace = peer.get("namespaceSelector", {}).get("matchLabels", {})
            namespace = labels_of_namespace.get("kubernetes.io/metadata.name", own_namespace)
            assert namespace in namespaces
            if "podSelector" in peer:
                assert has_match(namespace, peer["podSelector"]), f"{policy['metadata']['name']}: {peer}"


@pytest.mark.parametrize("name", BUILDS)
def test_ports_of_services_policies_and_containers_match(name: str) -> None:
    for service in of_kind(name, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        pod = next(pod for _, meta, pod in pods(name) if selects(selector, meta["labels"]))
        ports = {port["name"]: port["containerPort"] for container in pod["containers"] for port in container["ports"]}
        policy = next(p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == service["metadata"]["name"])
        (port,) = service["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"]
        assert [p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]] == [port["port"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_real_api_server_accepts_the_overlay(name: str) -> None:
    config = os.environ.get("RLHF_TEST_KUBECONFIG")
    if not config:
        pytest.skip("RLHF_TEST_KUBECONFIG names no cluster: nothing was applied to a real API server")
    for namespace in ("kubeflow", "rlhf", "rlhf-team"):  # a dry run creates no namespace for the objects in it
        subprocess.run([KUBECTL, f"--kubeconfig={config}", "create", "namespace", namespace], capture_output=True)
    command = [KUBECTL, f"--kubeconfig={config}", "apply", "--dry-run=server", "-f", "-"]
    run = subprocess.run(command, input=build(name), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
