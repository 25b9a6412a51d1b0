"""The runtime, the role and the network of TrainJobs fit the jobs that tasks create."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from components.rlhf.config.cluster import PROCESS_STAGES
from components.rlhf.config.params import Params
from components.rlhf.config.trainjob import TrainJobPlan
from components.rlhf.text.errors import InputError
from components.rlhf.trainjob.launch import LAST_STAGE
from components.rlhf.trainjob.manifest import StageCall, trainjob
from pipelines.compile import compile_pipeline
from pipelines.settings import load_params
from pipelines.trainjob import plan_of
from tests.manifests.test_build import assert_valid, selects
from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.overlays import OVERLAYS, ROOT, Object, of_kind
from tests.support.trainjob_api import TRAINJOB

PARAMS, BUILD = ROOT / "pipelines" / "params", "standalone+trainjob"
FOUR = PARAMS / "llama3_70b_4node.yaml"
TWO_CPUS = ("cluster.profiles={two: {like: cpu, num_nodes: 2}}", "cluster.stages={sft: two}")
CALL = StageCall(
    stage="sft", module="components.sft", run_id="0b2d6a3e-9f0c-4b7a-9a59-4a1c8f0e1d2c", num_processes=32, options=["--a", "b"],
    executor_input="{}", environment={"RLHF_RUN_ID": "x"}, owner=None,
)  # fmt: skip


def load(*overrides: str, file: str = "llama3_8b_8gpu") -> Params:
    two = ["cluster.launcher=trainjob", "cluster.profiles={gpu-8x80gb: {num_nodes: 2}}", "storage.uri=s3://bucket/rlhf"]
    return load_params(PARAMS / f"{file}.yaml", [*two, *overrides])


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    return CompiledPipeline(load(), tmp_path_factory.mktemp("two_nodes"))


def runtime() -> Object:
    (found,) = of_kind(BUILD, "TrainingRuntime")
    return found


def node_template() -> Object:
    (job,) = runtime()["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    template: Object = job["template"]["spec"]["template"]
    return template


def plan_in(compiled: CompiledPipeline, stage: str) -> TrainJobPlan:
    return TrainJobPlan.from_json(compiled.pods[stage]["podMetadata"]["annotations"]["kfp-rlhf/trainjob"])


# --- the manifests


def test_runtime_is_the_one_that_jobs_name_and_has_what_trainer_looks_for() -> None:
    params = load_params(PARAMS / "tiny.yaml")
    assert (runtime()["metadata"]["name"], runtime()["metadata"]["namespace"]) == (params.cluster.runtime, "kubeflow")
    (job,) = runtime()["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    (container,) = node_template()["spec"]["containers"]
    assert container["name"] == "node"
    assert runtime()["spec"]["mlPolicy"]["torch"] == {}
    network = runtime()["spec"]["template"]["spec"]["network"]
    assert network == {"enableDNSHostnames": True, "publishNotReadyAddresses": True}  # subdomain: the name of the job


def test_a_lost_node_ends_the_job() -> None:
    (job,) = runtime()["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimit"] == 0 and node_template()["spec"]["restartPolicy"] == "Never"
    assert runtime()["spec"]["template"]["spec"]["failurePolicy"] == {"maxRestarts": 0}


def test_pods_of_the_runtime_are_restricted_and_have_no_token() -> None:
    pod = node_template()["spec"]
    assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] == "rlhf-runner"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_schema_rejects_what_the_published_one_does_not_have() -> None:
    with pytest.raises(jsonschema.ValidationError):
        assert_valid({**runtime(), "spec": {**runtime()["spec"], "mlPolicies": {}}})
    broken = json.loads(json.dumps(runtime()))
    broken["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        assert_valid(broken)


def test_role_allows_what_the_launcher_asks_for_and_nothing_else() -> None:
    (role,) = [r for r in of_kind(BUILD, "Role") if r["metadata"]["name"] == "rlhf-trainjobs"]
    granted = {
        (g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]
    }
    trainer = {("trainer.kubeflow.org", "trainjobs", verb) for verb in ("create", "get", "list", "watch", "delete")}
    assert granted == trainer | {("", "pods", verb) for verb in ("get", "list", "watch")} | {("", "pods/log", "get")}
    others = [r for name in OVERLAYS for r in of_kind(name, "Role") if "trainjobs" in str(r)]
    assert others == [], "an overlay without the component grants it"


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_of_a_job_reach_one_another_and_tasks_do_not_reach_them(name: str, two_nodes: CompiledPipeline) -> None:
    (policy,) = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == "rlhf-process-groups"]
    workers = plan_in(two_nodes, "ppo").labels
    launcher = two_nodes.pods["ppo"]["podMetadata"]["labels"]
    assert selects(policy["spec"]["podSelector"], workers) and not selects(policy["spec"]["podSelector"], launcher)
    for direction, peers in (("ingress", "from"), ("egress", "to")):
        (rule,) = policy["spec"][direction]
        (peer,) = rule[peers]
        assert set(rule) == {peers}, "any port: torchrun and NCCL choose theirs"
        assert selects(peer["podSelector"], workers) and not selects(peer["podSelector"], launcher)
    for policy_name in ("rlhf-default-deny", "rlhf-tasks"):  # DNS, MLflow; the launcher also reaches the Kubernetes API
        (policy,) = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == policy_name]
        assert selects(policy["spec"]["podSelector"], workers) and selects(policy["spec"]["podSelector"], launcher)


# --- the compiled pipeline


def test_task_of_a_launched_stage_is_small_and_has_no_accelerators(two_nodes: CompiledPipeline) -> None:
    for stage in ("sft", "reward-model", "ppo", "evaluation"):
        container, pod = two_nodes.containers[stage], two_nodes.pods[stage]
        assert container["image"] == "kfp-rlhf/tools:0.1.0"
        assert container["command"] == ["python", "-m", f"components.{stage.replace('-', '_')}"]
        resources = container["resources"]
        assert (resources["resourceCpuLimit"], resources["resourceMemoryLimit"]) == ("2", "8Gi")
        assert "accelerator" not in resources
        assert not {"nodeSelector", "tolerations", "nodeAffinity", "emptyDirMounts"} & set(pod)
        variables = {entry["name"]: entry["fieldPath"] for entry in pod["fieldPathAsEnv"]}
        assert variables == {
            "RLHF_RUN_ID": "metadata.labels['pipeline/runid']",
            "RLHF_POD_NAME": "metadata.name",
            "RLHF_POD_NAMESPACE": "metadata.namespace",
            "RLHF_TRAINJOB": "metadata.annotations['kfp-rlhf/trainjob']",
        }
        assert int(pod["activeDeadlineSeconds"]) > 365 * 24 * 3600, "the time in a queue has no limit"
    assert set(two_nodes.secrets("evaluation")) == {"rlhf-s3", "rlhf-s3?"}, "MLflow is for the pods of the job"
    assert not [key for key in two_nodes.spec["root"]["inputDefinitions"]["parameters"] if "8x80gb" in key]


def test_two_policies_are_trained_and_evaluated_in_jobs_of_their_own(tmp_path: Path) -> None:
    overrides = ("policy.method=both", "cluster.stages={dpo: gpu-8x80gb, evaluation: gpu-8x80gb}")
    params = load(*overrides)
    assert (params.dpo.training.num_processes, params.cluster.launches("dpo")) == (16, True)
    compiled = CompiledPipeline(params, tmp_path)
    for stage, module in (("dpo", "dpo"), ("evaluation", "evaluation"), ("evaluation-2", "evaluation")):
        assert compiled.containers[stage]["image"] == "kfp-rlhf/tools:0.1.0"
        assert compiled.containers[stage]["command"] == ["python", "-m", f"components.{module}"]
        plan = plan_in(compiled, stage)
        assert (plan.num_nodes, plan.resources["nvidia.com/gpu"]) == (2, "8")
        TRAINJOB.validate(trainjob(plan, CALL))
    assert plan_in(compiled, "dpo").image == "kfp-rlhf/trainer:0.1.0"
    settings = [
        json.loads(compiled.tasks[task]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"])["stage_name"]
        for task in ("evaluation", "evaluation-2")
    ]
    jobs = [
        trainjob(plan_in(compiled, "evaluation"), replace(CALL, stage=name, module="components.evaluation"))
        for name in settings
    ]
    # The exchange on a shared claim is deleted after the stage of this name, which is the last one that is launched.
    assert settings == ["ppo_evaluation", LAST_STAGE]
    assert jobs[0]["metadata"]["name"] != jobs[1]["metadata"]["name"]


def test_launcher_changes_no_settings(two_nodes: CompiledPipeline, tmp_path: Path) -> None:
    """So digests, checkpoints and caches are those of any other launcher."""

    def settings(compiled: CompiledPipeline) -> dict[str, Any]:
        return {
            stage: task["inputs"]["parameters"]["settings"]
            for stage, task in compiled.tasks.items()
            if stage != "notify"
        }

    one = load_params(
        PARAMS / "llama3_8b_8gpu.yaml",
        ["storage.uri=s3://bucket/rlhf", "cluster.profiles={gpu-8x80gb: {num_accelerators: 16}}"],
    )
    assert settings(CompiledPipeline(one, tmp_path)) == settings(two_nodes)


def test_plan_has_everything_that_the_profile_gives_to_a_pod() -> None:
    mine = "{like: gpu-8x80gb, num_nodes: 2, queue: team, scratch: {size: 500Gi}, labels: {team: a}, node_selector: {zone: b}}"
    params = load(
        f"cluster.profiles={{mine: {mine}}}", "cluster.stages={sft: mine, ppo: mine, reward_model: mine}",
        "cluster.environment={NCCL_IB_HCA: mlx5}", "cluster.image_pull_secrets=[pull]", "cluster.timeout_hours=2",
    )  # fmt: skip
    plan = plan_of(params, "ppo")
    assert (plan.num_nodes, plan.queue, plan.deadline_seconds, plan.image) == (
        2,
        "team",
        7200,
        "kfp-rlhf/rollout:0.1.0",
    )
    assert plan.resources == {"cpu": "64", "memory": "704Gi", "nvidia.com/gpu": "8"}
    values = {entry["name"]: entry.get("value") for entry in plan.environment}
    assert values["NCCL_IB_HCA"] == "mlx5" and values["RLHF_NUM_ACCELERATORS"] == "8" and values["TMPDIR"] == "/scratch"
    secret = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in plan.environment if "valueFrom" in e}
    assert secret["AWS_SECRET_ACCESS_KEY"] == {"name": "rlhf-s3", "key": "AWS_SECRET_ACCESS_KEY", "optional": False}
    assert secret["MLFLOW_TRACKING_URI"]["optional"] is True
    assert plan.labels == {
        "app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/stage": "ppo", "kfp-rlhf/process-group": "true", "team": "a"
    }  # fmt: skip
    assert plan.pod["nodeSelector"] == {"zone": "b"} and plan.pod["imagePullSecrets"] == [{"name": "pull"}]
    assert plan.pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    (term,) = plan.pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term == {"matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["79000"]}]}
    assert plan.pod["securityContext"] == {"runAsUser": 1000, "runAsGroup": 1000, "runAsNonRoot": True}
    assert {m["mountPath"] for m in plan.volume_mounts} == {"/dev/shm", "/scratch"}
    assert {v["name"] for v in plan.pod["volumes"]} == {m["name"] for m in plan.volume_mounts}


ENDPOINT = "judge={kind: endpoint, url: 'https://api.example.com/v1', model: gpt}"


def test_pods_of_evaluation_reach_the_endpoint_judge_and_the_waiting_task_does_not(tmp_path: Path) -> None:
    """In several processes on two nodes; label, keys and answers are those of the pods that ask."""
    params = load(ENDPOINT, "cluster.stages={evaluation: gpu-8x80gb}")
    assert params.evaluation.num_processes == 16
    compiled = CompiledPipeline(params, tmp_path)
    plan, task = plan_in(compiled, "evaluation"), compiled.pods["evaluation"]["podMetadata"]["labels"]
    assert (plan.num_nodes, plan.resources["nvidia.com/gpu"], plan.image) == (2, "8", "kfp-rlhf/rollout:0.1.0")
    secrets = {e["name"]: e["valueFrom"]["secretKeyRef"]["name"] for e in plan.environment if "valueFrom" in e}
    assert secrets["OPENAI_API_KEY"] == "rlhf-judge" and secrets["AWS_SECRET_ACCESS_KEY"] == "rlhf-s3"
    assert set(compiled.secrets("evaluation")) == {"rlhf-s3", "rlhf-s3?"}
    for name in OVERLAYS:
        (policy,) = [p for p in of_kind(name, "NetworkPolicy") if p["metadata"]["name"] == "rlhf-endpoints"]
        assert selects(policy["spec"]["podSelector"], plan.labels) and not selects(policy["spec"]["podSelector"], task)
    assert "kfp-rlhf/egress" not in plan_of(load(), "evaluation").labels
    assert not {"kfp-rlhf/egress"} & set(plan_in(compiled, "ppo").labels)


def test_evaluation_and_its_pods_mount_the_shared_claim(tmp_path: Path) -> None:
    """Through which inputs and outputs go; a task that is no TrainJob gets its inputs from KFP."""
    claim = ("storage.uri=null", "cluster.checkpoint_claim=rlhf-checkpoints")
    compiled = CompiledPipeline(load(*claim), tmp_path)
    (mount,) = compiled.pods["evaluation"]["pvcMount"]
    assert mount["mountPath"] == "/checkpoints"
    assert {"name": "checkpoints", "mountPath": "/checkpoints"} in plan_in(compiled, "evaluation").volume_mounts
    one = ("cluster.launcher=local", "cluster.profiles={gpu-8x80gb: {num_nodes: 1}}")
    assert "pvcMount" not in CompiledPipeline(load(*claim, *one), tmp_path).pods["evaluation"]


def test_variable_of_the_run_and_key_of_a_secret_are_one_variable() -> None:
    """A TrainJob refuses a name that occurs twice. A required key wins, and an optional one gives way."""
    environment = (
        "cluster.environment={AWS_REGION: eu, AWS_ACCESS_KEY_ID: mine, RLHF_RUN_ID: x, RLHF_TRAINJOB_DIGEST: y}"
    )
    plan = plan_of(load(environment), "sft")
    values = {entry["name"]: entry.get("value") for entry in plan.environment}
    assert (values["AWS_REGION"], values["AWS_ACCESS_KEY_ID"]) == ("eu", None)
    env = trainjob(plan, CALL)["spec"]["trainer"]["env"]
    names = [entry["name"] for entry in env]
    assert len(names) == len(set(names))
    assert {entry["name"]: entry.get("value") for entry in env}["RLHF_TRAINJOB_DIGEST"] != "y"


VARIANTS = {
    "plain": (),
    "claim": ("storage.uri=null", "cluster.checkpoint_claim=rlhf-checkpoints"),
    "preferred": (
        "cluster.profiles={gpu-8x80gb: {num_nodes: 2, node_affinity: "
        "[{weight: 5, match_expressions: [{key: a, operator: Exists}]}]}}",
    ),
    "volume of its own": ("cluster.profiles={gpu-8x80gb: {num_nodes: 2, scratch: {size: 1Ti, storage_class: fast}}}",),
    "root": ("cluster.run_as_user=0", "cluster.service_account=null"),
    "no user": ("cluster.run_as_user=null",),
}  # fmt: skip


@pytest.mark.parametrize("stage", PROCESS_STAGES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_jobs_of_plans_match_the_published_schema(variant: str, stage: str) -> None:
    plan = plan_of(load(*VARIANTS[variant]), stage)
    job = trainjob(plan, CALL)
    TRAINJOB.validate(job)
    assert job["spec"]["trainer"]["numNodes"] == 2
    (replicated,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    merged = {**node_template()["spec"], **{k: v for k, v in pod.items() if k != "containers"}}
    merged["containers"] = [{**node_template()["spec"]["containers"][0], **pod.get("containers", [{}])[0]}]
    if variant == "claim":
        assert {"name": "checkpoints", "mountPath": "/checkpoints"} in merged["containers"][0]["volumeMounts"]
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": merged},
        kubernetes_validate.latest_version(), strict=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["storage.uri=null"], "storage that all nodes share; set storage.uri to s3://BUCKET/PREFIX, or cluster.checkpoint_claim"),
        (["storage.uri=null", "cluster.checkpoint_volume={storage_class: fast}"], "is a ReadWriteOnce claim"),
        (["storage.uri=null", "storage.checkpoint_uri=/data/x"], "storage that all nodes share"),
        (["cluster.default_profile=gpu-80gb"], "the tasks that wait for TrainJobs use it"),
        (["cluster.image_pull_policy=Always"], "a TrainJob has the one of its runtime"),
        (["cluster.environment={BIG: '" + "x" * 100_001 + "'}"], "too many for an annotation"),
    ],
)  # fmt: skip
def test_refused_when_compiled(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        compile_pipeline(load(*overrides), tmp_path / "p.yaml")
    assert message in str(error.value) and not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.launcher=local"], "has num_nodes 2, but launcher is local"),
        (["cluster.stages={judge: gpu-8x80gb}"], "the stage judge has the profile gpu-8x80gb with num_nodes 2"),
        (["cluster.stages={evaluation: gpu-8x80gb}", "evaluation.num_processes=8"], "evaluation.num_processes is 8, and the profile"),
        (["sft.training.num_processes=8"], "sft.training.num_processes is 8, and the profile gpu-8x80gb has 16 accelerators"),
        (["cluster.profiles={gpu-8x80gb: {num_nodes: 0}}"], "num_nodes"),
        (["cluster.profiles={gpu-8x80gb: {num_nodes: two}}"], "num_nodes"),
        ([*TWO_CPUS, "sft.training.num_processes=3"], "no multiple of the 2 nodes"),
    ],
)  # fmt: skip
def test_refused_as_settings(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as error:
        load(*overrides)
    assert message in str(error.value)


def test_number_of_processes_follows_from_nodes_and_accelerators() -> None:
    assert load().ppo.training.num_processes == 16
    cpus = load(*TWO_CPUS, file="tiny")
    assert (cpus.sft.training.num_processes, cpus.ppo.training.num_processes) == (2, 1)


def test_example_for_several_nodes_compiles(tmp_path: Path) -> None:
    compiled = CompiledPipeline(load_params(FOUR, ["storage.uri=s3://bucket/rlhf"]), tmp_path)
    plan = plan_in(compiled, "ppo")
    assert (plan.num_nodes, plan.resources["nvidia.com/gpu"]) == (4, "8")
    TRAINJOB.validate(trainjob(plan, CALL))


def test_readme_names_the_versions_of_the_schema() -> None:
    page = (ROOT / "manifests" / "README.md").read_text()
    head = (ROOT / "tests" / "manifests" / "trainer_schema.yaml").read_text().splitlines()[0]
    (version,) = re.findall(r"Trainer v(\d+\.\d+)", head)
    assert f"Kubeflow Trainer {version}" in page
    assert yaml.safe_load((ROOT / "manifests/components/trainjob/kustomization.yaml").read_text())["resources"]
