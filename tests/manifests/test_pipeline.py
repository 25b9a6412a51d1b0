"""The built manifests provide what compiled pipelines need, and their network policies allow the connections of its pods."""

import base64
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from pipelines.cluster.submit import DEFAULT_NAMESPACE
from pipelines.settings import load_params
from tests.manifests.test_build import selects
from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.overlays import BUILDS, OVERLAYS, ROOT, Object, objects, of_kind, pods

PARAMS = ROOT / "pipelines" / "params"
S3_OVERRIDES = ("storage.checkpoint_uri=s3://rlhf/checkpoints", "model.source=s3://rlhf/model")


def run_namespace(name: str) -> str:
    return "rlhf-team" if name == "multi-user" else DEFAULT_NAMESPACE


@pytest.fixture(scope="module")
def gpu_node(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    """Stages on 8 GPUs, data in files, a queue."""
    params = load_params(PARAMS / "llama3_8b_8gpu.yaml", ["cluster.profiles={gpu-8x80gb: {queue: rlhf}}"])
    return CompiledPipeline(params, tmp_path_factory.mktemp("gpu_node"))


@pytest.fixture(scope="module")
def cpu_with_s3(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    """Stages on CPUs, model and checkpoints in S3, data from a package."""
    return CompiledPipeline(
        load_params(PARAMS / "movie_reviews.yaml", S3_OVERRIDES), tmp_path_factory.mktemp("cpu_with_s3")
    )


@pytest.fixture(scope="module")
def with_endpoint(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    """A judge behind an API, whose answers are kept in S3; model from the hub, data from a package."""
    judge = "judge=[{kind: endpoint, url: 'https://api.openai.com/v1', model: gpt}, {kind: linear}]"
    params = load_params(PARAMS / "tiny.yaml", [judge, "storage.uri=s3://rlhf", "model.source=org/model"])
    return CompiledPipeline(params, tmp_path_factory.mktemp("with_endpoint"))


def labels(compiled: CompiledPipeline) -> dict[str, Object]:
    return {stage: pod["podMetadata"]["labels"] for stage, pod in compiled.pods.items()}


def names_of_kind(name: str, kind: str, namespace: str) -> set[str]:
    return {o["metadata"]["name"] for o in of_kind(name, kind) if o["metadata"].get("namespace") == namespace}


def secrets_of_runs(name: str) -> dict[str, Object]:
    """Content of the Secrets in the namespace of the runs."""
    return {
        secret["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in secret["data"].items()}
        for secret in of_kind(name, "Secret")
        if secret["metadata"]["namespace"] == run_namespace(name)
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_service_account_of_runs_exists_with_a_role(name: str) -> None:
    account = load_params(PARAMS / "tiny.yaml").cluster.service_account  # as set by submit
    assert account and account in names_of_kind(name, "ServiceAccount", run_namespace(name))
    bound = [b for b in of_kind(name, "RoleBinding") if b["metadata"]["namespace"] == run_namespace(name)]
    assert account in {s["name"] for b in bound for s in b["subjects"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_network_policies_select_the_right_tasks(
    name: str, gpu_node: CompiledPipeline, cpu_with_s3: CompiledPipeline, with_endpoint: CompiledPipeline
) -> None:
    """All tasks are restricted. Only those that download may reach the hub, only those that ask a judge its API; none that train."""
    policies = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["namespace"] == run_namespace(name)]
    assert {"rlhf-default-deny", "rlhf-tasks", "rlhf-hub", "rlhf-endpoints"} <= {
        p["metadata"]["name"] for p in policies
    }
    for compiled, downloading, asking in (
        (gpu_node, {"import-model"}, set()),  # a model from the hub and local data
        (cpu_with_s3, {"prepare-data"}, set()),  # a model in S3 and data from a package
        (with_endpoint, {"import-model", "prepare-data"}, {"judge", "evaluation"}),
    ):
        for policy in policies:
            policy_name = policy["metadata"]["name"]
            selected = {s for s, tags in labels(compiled).items() if selects(policy["spec"]["podSelector"], tags)}
            groups = {"sft", "reward-model", "ppo", "evaluation"}
            expected = {"rlhf-hub": downloading, "rlhf-endpoints": asking, "rlhf-process-groups": groups}
            assert selected == expected.get(policy_name, set(compiled.pods)), policy_name


@pytest.mark.parametrize("name", OVERLAYS)
def test_tasks_that_ask_a_judge_reach_any_address_but_the_metadata_server(name: str) -> None:
    """Its address and port are only known to its owner: a service outside, or a server in this cluster."""
    (policy,) = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == "rlhf-endpoints"]
    assert policy["metadata"]["namespace"] == run_namespace(name)
    selector = {"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/egress": "endpoint"}
    assert policy["spec"]["podSelector"] == {"matchLabels": selector}
    assert policy["spec"]["policyTypes"] == ["Egress"] and "ingress" not in policy["spec"]
    (rule,) = policy["spec"]["egress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": 1, "endPort": 65535}]
    blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
    assert blocks == [{"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}]  # credentials of nodes


@pytest.mark.parametrize("name", OVERLAYS)
def test_processes_of_a_stage_on_several_nodes_reach_one_another(name: str, gpu_node: CompiledPipeline) -> None:
    """On any port, because NCCL and torchrun choose theirs; other tasks of the namespace do not reach them."""
    (policy,) = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == "rlhf-process-groups"]
    assert policy["metadata"]["namespace"] == run_namespace(name)
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        (rule,) = policy["spec"][direction]
        assert set(rule) == {peers}  # no ports
        for stage, tags in labels(gpu_node).items():
            reached = any(selects(peer["podSelector"], tags) for peer in rule[peers])
            assert reached == (stage in ("sft", "reward-model", "ppo", "evaluation")), stage


def test_only_downloading_tasks_have_the_hub_label(tmp_path: Path) -> None:
    def downloading(params: str, *overrides: str) -> set[str]:
        compiled = CompiledPipeline(load_params(PARAMS / params, overrides), tmp_path)
        return {stage for stage, tags in labels(compiled).items() if tags.get("kfp-rlhf/egress") == "hub"}

    assert downloading("movie_reviews.yaml") == {"import-model", "prepare-data"}  # the ratings are a package
    assert downloading("llama3_8b_8gpu.yaml") == {"import-model"}
    assert downloading("llama3_8b_8gpu.yaml", "model.source=s3://b/m") == set()
    assert downloading("llama3_8b_8gpu.yaml", "model.source=s3://b/m", "sft.use=org/model") == {"import-sft-model"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_servers_accept_connections_of_every_task(name: str, gpu_node: CompiledPipeline) -> None:
    servers = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] in ("mlflow", "s3")]
    assert len(servers) == (1 if name in ("gke", "eks") else 2)
    for policy in servers:
        peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "namespaceSelector" in peer]
        for tags in labels(gpu_node).values():
            assert any(
                peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": run_namespace(name)}}
                and selects(peer["podSelector"], tags)
                for peer in peers
            ), policy["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_have_exactly_the_keys_that_tasks_read(
    name: str, gpu_node: CompiledPipeline, cpu_with_s3: CompiledPipeline, with_endpoint: CompiledPipeline
) -> None:
    created = secrets_of_runs(name)
    used: dict[str, tuple[set[str], set[str]]] = {}  # name -> required keys, all keys
    for compiled in (gpu_node, cpu_with_s3, with_endpoint):
        for stage in compiled.pods:
            for secret, (optional, keys) in compiled.secrets(stage).items():
                required, known = used.setdefault(secret.removesuffix("?"), (set(), set()))
                known.update(keys)
                required.update(() if optional else keys)
    assert set(created) <= set(used), "a Secret that no task reads"
    for secret, (required, known) in used.items():
        assert required <= set(created.get(secret, {})) <= known, secret
    manual = dict(re.findall(r"create secret generic (\S+) --from-literal=(\w+)=", page("manifests/README.md")))
    assert {s: manual.get(s) for s in used if s not in created} == {
        "rlhf-hf-token": "HF_TOKEN",
        "rlhf-judge": "OPENAI_API_KEY",
        "rlhf-webhook": "WEBHOOK_URL",
    }
    assert all(manual[s] in used[s][1] for s in manual)


def page(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OVERLAYS)
def test_addresses_in_secrets_are_reachable_services(name: str) -> None:
    secrets = secrets_of_runs(name)
    addresses = [secrets["rlhf-mlflow"]["MLFLOW_TRACKING_URI"], secrets["rlhf-s3"]["AWS_ENDPOINT_URL_S3"]]
    in_cluster = [urlsplit(address) for address in addresses if ".svc.cluster.local" in address]
    assert len(in_cluster) == (1 if name in ("gke", "eks") else 2)
    for address in in_cluster:
        service_name, namespace = str(address.hostname).split(".")[:2]
        (service,) = [
            s
            for s in of_kind(name, "Service")
            if (s["metadata"]["name"], s["metadata"]["namespace"]) == (service_name, namespace)
        ]
        assert address.port in {port["port"] for port in service["spec"]["ports"]}
        egress = [
            (peer, rule.get("ports", []))
            for policy in of_kind(name, "NetworkPolicy")
            if policy["metadata"]["namespace"] == run_namespace(name)
            for rule in policy["spec"].get("egress", [])
            for peer in rule["to"]
        ]
        assert any(
            peer.get("namespaceSelector") == {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
            and selects(peer["podSelector"], service["spec"]["selector"])
            and {"protocol": "TCP", "port": address.port} in ports
            for peer, ports in egress
        ), address


def test_shared_claim_of_checkpoints_can_be_mounted_by_two_runs_and_is_writable(tmp_path: Path) -> None:
    params = load_params(PARAMS / "llama3_8b_8gpu.yaml", ["cluster.checkpoint_claim=rlhf-checkpoints"])
    compiled, name = CompiledPipeline(params, tmp_path), "standalone+checkpoint-claim"
    mounts = [mount for pod in compiled.pods.values() for mount in pod.get("pvcMount", [])]
    assert {mount["pvcNameParameter"]["runtimeValue"]["constant"] for mount in mounts} == {"rlhf-checkpoints"}
    (claim,) = of_kind(name, "PersistentVolumeClaim")
    assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("rlhf-checkpoints", ["ReadWriteMany"])
    (job_pod,) = [pod for owner, _, pod in pods(name) if owner["metadata"]["name"] == "rlhf-open-checkpoints"]
    group = str(job_pod["securityContext"]["fsGroup"])
    for pod in compiled.pods.values():  # the Job gives the volume to the group of the tasks
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": group, "runAsNonRoot": True}


@pytest.mark.parametrize("name", BUILDS)
def test_only_the_component_for_claims_per_run_lets_runs_create_claims(name: str) -> None:
    roles = [
        role for role in of_kind(name, "Role") if role["metadata"]["namespace"] == run_namespace(name.partition("+")[0])
    ]
    verbs = {
        verb
        for role in roles
        for rule in role["rules"]
        if "persistentvolumeclaims" in rule["resources"]
        for verb in rule["verbs"]
    }
    assert verbs == ({"create", "delete"} if name.endswith("run-claims") else set())


def test_largest_task_fits_quota_and_queue(gpu_node: CompiledPipeline) -> None:
    """One stage at a time uses GPUs. If it exceeds the multi-user quota or that of Kueue, it waits forever."""
    largest = gpu_node.containers["ppo"]["resources"]
    (quota,) = [o for o in of_kind("multi-user", "ResourceQuota") if o["metadata"]["namespace"] == "rlhf-team"]
    (queue,) = of_kind("standalone+kueue", "ClusterQueue")
    (flavor,) = queue["spec"]["resourceGroups"][0]["flavors"]
    nominal = {resource["name"]: resource["nominalQuota"] for resource in flavor["resources"]}
    hard = quota["spec"]["hard"]
    for quota_values in (nominal, {name: hard[f"requests.{name}"] for name in ("cpu", "memory", "nvidia.com/gpu")}):
        assert int(largest["resourceCpuRequest"]) <= int(quota_values["cpu"])
        assert gibibytes(largest["resourceMemoryRequest"]) <= gibibytes(quota_values["memory"])
        assert int(largest["accelerator"]["resourceCount"]) <= int(quota_values["nvidia.com/gpu"])


def gibibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Gi": 1, "Ti": 1024}[quantity[-2:]]


def test_requests_on_kind_are_those_that_the_readme_adds_up(tmp_path: Path) -> None:
    """At most two stages run at once: the judge beside the others."""
    compiled = CompiledPipeline(load_params(PARAMS / "tiny.yaml"), tmp_path)
    (stage,) = {
        (c["resources"]["resourceCpuRequest"], c["resources"]["resourceMemoryRequest"])
        for c in compiled.containers.values()
    }
    assert stage == ("1", "4Gi")
    cpu, memory = 2.0, 2 * 4 * 1024.0
    for owner, _, pod in pods("kind"):
        if owner["kind"] != "Job":
            requests = pod["containers"][0]["resources"]["requests"]
            cpu += int(requests["cpu"].removesuffix("m")) / 1000
            memory += int(requests["memory"][:-2]) * {"Mi": 1, "Gi": 1024}[requests["memory"][-2:]]
    assert f"request {cpu:g} CPUs and {memory / 1024:g} GiB" in page("manifests/README.md")


def test_queue_of_a_profile_is_in_the_namespace_of_runs(gpu_node: CompiledPipeline) -> None:
    queues = {
        tags["kueue.x-k8s.io/queue-name"] for tags in labels(gpu_node).values() if "kueue.x-k8s.io/queue-name" in tags
    }
    assert queues == {"rlhf"} == names_of_kind("standalone+kueue", "LocalQueue", DEFAULT_NAMESPACE)


@pytest.mark.parametrize("name", BUILDS)
def test_namespace_of_runs_gets_only_allowed_kinds(name: str) -> None:
    """The namespace of the runs has other tenants."""
    kinds = {o["kind"] for o in objects(name) if o["metadata"].get("namespace") == run_namespace(name)}
    allowed = {"ServiceAccount", "Role", "RoleBinding", "PersistentVolumeClaim", "Job", "Secret", "NetworkPolicy"}
    extra = (
        {"ResourceQuota", "LimitRange"} if name == "multi-user" else set()
    )  # a profile namespace has no other tenants
    components = {"kueue": {"LocalQueue"}, "trainjob": {"TrainingRuntime"}}
    assert kinds <= allowed | extra | components.get(name.partition("+")[2], set())
