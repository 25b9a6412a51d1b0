"""Every overlay builds, fits the schemas of Kubernetes strictly, and names nothing that is not there."""

import os
import subprocess
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.overlays import BUILDS, KUBECTL, ROOT, Object, built, containers, objects, of_kind, pods

KUEUE = yaml.safe_load((ROOT / "tests" / "manifests" / "kueue_schema.yaml").read_text())
# What others bring: Kubeflow Pipelines its namespace, Kubernetes the namespace of its DNS, the profile controller a profile.
FOREIGN_NAMESPACES = {"kubeflow", "kube-system", "rlhf-team"}
FOREIGN_NAMES = {("ConfigMap", "kfp-launcher"), ("Secret", "mlpipeline-minio-artifact")}
# The labels that the pipeline sets on its tasks.
TASK_LABELS = {"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/egress": "hub"}


def assert_valid(found: Object) -> None:
    """Strictly against the newest schema that is installed; a kind without a schema raises too."""
    if found["apiVersion"].startswith("kueue.x-k8s.io/"):
        jsonschema.validate(found, KUEUE[found["kind"]])
    else:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("name", BUILDS)
def test_schemas(name: str) -> None:
    for found in objects(name):
        assert_valid(found)


def test_a_wrong_field_and_an_unknown_kind_are_refused() -> None:
    claim = of_kind("kind", "PersistentVolumeClaim")[0]
    with pytest.raises(kubernetes_validate.ValidationError):
        assert_valid({**claim, "spec": {**claim["spec"], "acessModes": []}})
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        assert_valid({**claim, "kind": "Cliam"})
    queue = of_kind("standalone+kueue", "LocalQueue")[0]
    with pytest.raises(jsonschema.ValidationError):
        assert_valid({**queue, "spec": {"clusterqueue": "rlhf"}})


def names_in(value: Any) -> set[tuple[str, str]]:
    """(kind, name) of every ConfigMap, Secret, claim and account that a pod names."""
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
        return set().union(*map(names_in, value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found = {(kind, value[key][field]) for key, (kind, field) in keys.items() if key in value}
    if "serviceAccountName" in value:
        found.add(("ServiceAccount", value["serviceAccountName"]))
    return found.union(*map(names_in, value.values()))


@pytest.mark.parametrize("name", BUILDS)
def test_pods_name_what_is_there(name: str) -> None:
    there = {(found["metadata"].get("namespace"), found["kind"], found["metadata"]["name"]) for found in objects(name)}
    for owner, _, pod in pods(name):
        missing = {pair for pair in names_in(pod) if (owner["metadata"]["namespace"], *pair) not in there}
        assert missing == set(), owner["metadata"]["name"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        volumes |= {claim["metadata"]["name"] for claim in owner["spec"].get("volumeClaimTemplates", [])}
        mounted = {mount["name"] for one in containers(pod) for mount in one.get("volumeMounts", [])}
        assert mounted == volumes, owner["metadata"]["name"]


@pytest.mark.parametrize("name", BUILDS)
def test_roles_bind_to_what_is_there(name: str) -> None:
    there = {(found["metadata"].get("namespace"), found["kind"], found["metadata"]["name"]) for found in objects(name)}
    kinds = {"configmaps": "ConfigMap", "secrets": "Secret"}
    for binding in of_kind(name, "RoleBinding"):
        for target in [binding["roleRef"], *binding["subjects"]]:
            assert (target.get("namespace", binding["metadata"]["namespace"]), target["kind"], target["name"]) in there
    for role in of_kind(name, "Role"):
        for rule in role["rules"]:
            for pair in [(kinds[r], n) for r in rule["resources"] if r in kinds for n in rule["resourceNames"]]:
                assert pair in FOREIGN_NAMES or (role["metadata"]["namespace"], *pair) in there


def selects(selector: Object, labels: Object) -> bool:
    given = selector.get("matchLabels", {}).items()
    wanted = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in wanted)
    return all(labels.get(k) == v for k, v in given) and all(labels.get(w["key"]) in w["values"] for w in wanted)


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_select_something(name: str) -> None:
    labels = [(owner["metadata"]["namespace"], meta["labels"]) for owner, meta, _ in pods(name)]
    runs = of_kind(name, "ServiceAccount")
    run_namespace = next(a["metadata"]["namespace"] for a in runs if a["metadata"]["name"] == "rlhf-runner")
    labels.append((run_namespace, TASK_LABELS))
    namespaces = FOREIGN_NAMESPACES | {found["metadata"]["name"] for found in of_kind(name, "Namespace")}

    def hit(namespace: str, selector: Object) -> bool:
        return any(ns == namespace and selects(selector, found) for ns, found in labels)

    for service in of_kind(name, "Service"):
        assert hit(service["metadata"]["namespace"], {"matchLabels": service["spec"]["selector"]})
    for policy in of_kind(name, "NetworkPolicy", "PodDisruptionBudget"):
        spec, here = policy["spec"], policy["metadata"]["namespace"]
        assert hit(here, spec.get("podSelector", spec.get("selector"))), policy["metadata"]["name"]
        sides = [peer for rule in spec.get("ingress", []) for peer in rule["from"]]
        sides += [peer for rule in spec.get("egress", []) for peer in rule["to"]]
        for peer in sides:
            there = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", here)
            assert there in namespaces
            if "podSelector" in peer:
                assert hit(there, peer["podSelector"]), f"{policy['metadata']['name']}: {peer}"


@pytest.mark.parametrize("name", BUILDS)
def test_ports_of_services_and_policies_are_opened_by_containers(name: str) -> None:
    for service in of_kind(name, "Service"):
        selector = {"matchLabels": service["spec"]["selector"]}
        pod = next(pod for _, meta, pod in pods(name) if selects(selector, meta["labels"]))
        ports = {port["name"]: port["containerPort"] for one in pod["containers"] for port in one["ports"]}
        policy = next(p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == service["metadata"]["name"])
        (port,) = service["spec"]["ports"]
        assert ports[port["targetPort"]] == port["port"]
        assert [p["port"] for rule in policy["spec"]["ingress"] for p in rule["ports"]] == [port["port"]]


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_a_real_api_server_takes_it(name: str) -> None:
    config = os.environ.get("RLHF_TEST_KUBECONFIG")
    if not config:
        pytest.skip("RLHF_TEST_KUBECONFIG names no cluster: nothing was applied to a real API server")
    for namespace in ("kubeflow", "rlhf", "rlhf-team"):  # a dry run makes no namespace for what follows in it
        subprocess.run([KUBECTL, f"--kubeconfig={config}", "create", "namespace", namespace], capture_output=True)
    command = [KUBECTL, f"--kubeconfig={config}", "apply", "--dry-run=server", "-f", "-"]
    run = subprocess.run(command, input=built(name), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
