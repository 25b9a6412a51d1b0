"""Image, node, memory, secrets, volumes, retries and caching of each executor in the compiled spec."""

import re
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format
from kfp.kubernetes import kubernetes_executor_config_pb2
from kfp.pipeline_spec import pipeline_spec_pb2

from components.rlhf.config.cluster import STAGES
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.storage import SETTINGS_VARIABLE
from components.rlhf.text.errors import InputError
from pipelines.compile import ROOT
from pipelines.placement import IMAGE_OF, require_digests
from pipelines.profiles import builtin_profiles
from pipelines.settings import load_params
from tests.support.compiled_pipelines import CompiledPipeline

MOVIES, TINY = (ROOT / "pipelines" / "params" / f"{name}.yaml" for name in ("movie_reviews", "tiny"))
DIGEST = "sha256:" + "ab" * 32
TRAINING = {"sft", "reward-model", "ppo"}
GPU_STAGES = TRAINING | {"evaluation"}
MLFLOW = ["MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"]


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> CompiledPipeline:
    """The params file for a node with eight GPUs."""
    return CompiledPipeline(
        load_params(ROOT / "pipelines/params/llama3_8b_8gpu.yaml"), tmp_path_factory.mktemp("eight")
    )


def tiny(folder: Path, *overrides: str) -> CompiledPipeline:
    return CompiledPipeline(load_params(TINY, overrides), folder)


def test_component_yaml_has_the_default_image_of_the_stage() -> None:
    assert set(IMAGE_OF) == set(STAGES)
    for stage, role in IMAGE_OF.items():
        text = (ROOT / "components" / stage / "component.yaml").read_text()
        assert re.findall(r"image: (\S+)", text) == [f"kfp-rlhf/{role}:0.1.0"]


def test_images_and_commands(eight: CompiledPipeline) -> None:
    images = {stage: container["image"].split(":")[0] for stage, container in eight.containers.items()}
    assert images == {
        "import-model": "kfp-rlhf/trainer",
        "prepare-data": "kfp-rlhf/trainer",
        "sft": "kfp-rlhf/trainer",
        "reward-model": "kfp-rlhf/rollout",  # it samples with vLLM
        "judge": "kfp-rlhf/trainer",
        "ppo": "kfp-rlhf/rollout",
        "evaluation": "kfp-rlhf/rollout",
        "register": "kfp-rlhf/tools",
        "register-2": "kfp-rlhf/tools",
        "notify": "kfp-rlhf/tools",
    }
    for stage, container in eight.containers.items():
        module = stage.removesuffix("-2").replace("-", "_")
        assert container["command"] == ["python", "-m", f"components.{module}"]


def test_gpus_cpus_and_memory(eight: CompiledPipeline) -> None:
    seen = {}
    for stage, container in eight.containers.items():
        resources = container["resources"]
        gpu = resources.get("accelerator", {})
        assert resources["resourceCpuRequest"] == resources["resourceCpuLimit"]
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"]
        seen[stage] = (
            gpu.get("resourceType", ""),
            int(gpu.get("resourceCount", 0)),
            resources["resourceCpuLimit"],
            resources["resourceMemoryLimit"],
        )
    node, small = ("nvidia.com/gpu", 8, "64", "704Gi"), ("", 0, "2", "8Gi")  # 640Gi and 64Gi of /dev/shm
    assert seen == {
        "import-model": ("", 0, "8", "64Gi"),
        "prepare-data": small,
        "sft": node,
        "reward-model": node,
        "judge": small,
        "ppo": node,
        "evaluation": node,
        "register": small,
        "register-2": small,
        "notify": small,
    }


def test_shared_memory_size(eight: CompiledPipeline) -> None:
    mounts = {stage: pod.get("emptyDirMounts") for stage, pod in eight.pods.items()}

    def shm(size: str) -> list[dict[str, str]]:
        return [{"volumeName": "shm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": size}]

    assert {stage: mount for stage, mount in mounts.items() if mount} == dict.fromkeys(GPU_STAGES, shm("64Gi"))


def test_node_selectors_tolerations_and_affinity(eight: CompiledPipeline) -> None:
    """Stages with accelerators take selector and tolerations from two inputs of the pipeline per profile."""
    affinity = [{"matchExpressions": [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": ["79000"]}]}]
    taint = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    for stage, pod in eight.pods.items():
        placement = pod.get("nodeSelector"), pod.get("tolerations"), pod.get("nodeAffinity")
        if stage in GPU_STAGES:
            selector = {"nodeSelectorJson": {"componentInputParameter": "pipelinechannel--node_selector_gpu_8x80gb"}}
            tolerations = [{"tolerationJson": {"componentInputParameter": "pipelinechannel--tolerations_gpu_8x80gb"}}]
            assert placement == (selector, tolerations, affinity)
        else:
            assert placement == (None, None, None), stage
    inputs = eight.spec["root"]["inputDefinitions"]["parameters"]
    selector = inputs["node_selector_gpu_8x80gb"]
    assert selector == {"defaultValue": {}, "isOptional": True, "parameterType": "STRUCT"}
    assert inputs["tolerations_gpu_8x80gb"]["defaultValue"] == [taint]
    assert inputs["tolerations_gpu_8x80gb"]["parameterType"] == "LIST"


def test_node_selector_of_the_profile_is_the_default_of_the_input(tmp_path: Path) -> None:
    compiled = tiny(tmp_path, "cluster.stages={ppo: gke-gpu-24gb, judge: gke-gpu-24gb, sft: eks-gpu-24gb}")
    inputs = compiled.spec["root"]["inputDefinitions"]["parameters"]
    assert inputs["node_selector_gke_gpu_24gb"]["defaultValue"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert inputs["node_selector_eks_gpu_24gb"]["defaultValue"] == {}
    assert {stage for stage, pod in compiled.pods.items() if "nodeSelector" in pod} == {"ppo", "judge", "sft"}
    (term,) = compiled.pods["sft"]["nodeAffinity"]
    assert term["matchExpressions"][0]["key"] == "node.kubernetes.io/instance-type"
    assert "g6.4xlarge" in term["matchExpressions"][0]["values"]


def test_profiles_that_are_one_input_are_refused(tmp_path: Path) -> None:
    profiles = "cluster.profiles={my-gpu: {like: gpu-24gb}, my_gpu: {like: gpu-80gb}}"
    with pytest.raises(
        InputError,
        match=r"my-gpu and my_gpu are one name as an input of the pipeline .node_selector_my_gpu.; rename one",
    ):
        tiny(tmp_path, profiles, "cluster.stages={sft: my-gpu, ppo: my_gpu}")


def test_pipeline_has_no_node_inputs_without_gpus(tmp_path: Path) -> None:
    compiled = tiny(tmp_path)
    assert set(compiled.spec["root"]["inputDefinitions"]["parameters"]) == {"tracking", "storage"}
    assert not any("nodeSelector" in pod or "tolerations" in pod for pod in compiled.pods.values())
    assert not any("accelerator" in container["resources"] for container in compiled.containers.values())


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("cluster.num_retries=1", "cluster.timeout_hours=0.5"),
        ("cluster.num_retries=10", "cluster.timeout_hours=8760"),
    ],
)
def test_every_attempt_of_a_stage_may_take_its_whole_time(overrides: tuple[str, ...], tmp_path: Path) -> None:
    """Argo retries nothing after backoffMaxDuration since the start of the first attempt, and ends an attempt then."""
    params = load_params(ROOT / "pipelines/params/llama3_8b_8gpu.yaml", overrides)
    compiled = CompiledPipeline(params, tmp_path)
    assert {"sft", "import-model", "register", "notify"} <= set(compiled.tasks)
    for stage, task in compiled.tasks.items():
        retry, timeout = task["retryPolicy"], int(compiled.pods[stage]["activeDeadlineSeconds"])
        assert timeout == 3600 * params.cluster.timeout_hours and retry["maxRetryCount"] == params.cluster.num_retries
        waits = [seconds(retry["backoffDuration"]) * retry["backoffFactor"] ** n for n in range(retry["maxRetryCount"])]
        assert waits[0] == 60
        needed = (retry["maxRetryCount"] + 1) * timeout + sum(waits)
        assert seconds(retry["backoffMaxDuration"]) >= needed + 7 * 24 * 3600, stage  # and pods wait for nodes


def test_no_retries_can_be_chosen(tmp_path: Path) -> None:
    compiled = tiny(tmp_path, "cluster.num_retries=0")
    assert not any("retryPolicy" in task for task in compiled.tasks.values())


def test_stages_get_only_the_secrets_they_need(eight: CompiledPipeline) -> None:
    everyone = {"rlhf-mlflow?": (True, MLFLOW)}
    more = {
        "import-model": {"rlhf-hf-token?": (True, ["HF_TOKEN"])},
        "notify": {"rlhf-webhook?": (True, ["WEBHOOK_URL"])},
    }
    for stage in eight.pods:
        assert eight.secrets(stage) == everyone | more.get(stage, {}), stage


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), set()),  # a package, which needs no token
        (("model.source=org/model",), {"import-model"}),
        (("data.prompts={path: org/prompts}",), {"prepare-data"}),
        (("data.prompts=[{path: org/prompts, config: a}, {path: s3://b/p.jsonl}]",), {"prepare-data"}),
        (("data.prompts=[{path: ./mine.jsonl}, {path: 's3://b/p.jsonl'}]",), set()),
        (("sft.use=org/sft",), {"import-sft-model"}),
        (("reward_model.use=org/rm", "sft.use=s3://b/sft"), {"import-reward-model"}),
        (("model.source=s3://b/m", "sft.use=/data/sft", "cluster.claims={/data: team}"), set()),
        (("model.source=org/model", "cluster.secrets.hf_token=null"), set()),
    ],
)
def test_only_tasks_that_read_the_hub_get_its_token(
    overrides: tuple[str, ...], expected: set[str], tmp_path: Path
) -> None:
    compiled = tiny(tmp_path, *overrides)
    assert {stage for stage in compiled.pods if "rlhf-hf-token?" in compiled.secrets(stage)} == expected


def test_claim_per_run_is_created_opened_and_deleted(tmp_path: Path) -> None:
    """The claim is on the nodes of PPO, whose zone it may be bound to; a run that fails keeps it for a retry."""
    stages = "cluster.stages={ppo: gke-gpu-24gb, sft: gke-gpu-24gb, reward_model: gke-gpu-24gb}"
    compiled = tiny(tmp_path, "cluster.checkpoint_volume={storage_class: fast, size: 20Gi}", stages)
    (dag,) = [dag for dag in compiled.dags if "createpvc" in dag["tasks"]]
    created = {k: v["runtimeValue"]["constant"] for k, v in dag["tasks"]["createpvc"]["inputs"]["parameters"].items()}
    assert created == {
        "access_modes": ["ReadWriteOnce"], "size": "20Gi", "storage_class_name": "fast", "pvc_name_suffix": "-rlhf-checkpoints",
    }  # fmt: skip
    name = {"taskOutputParameter": {"producerTask": "createpvc", "outputParameterKey": "name"}}
    mounting = {
        stage for stage, pod in compiled.pods.items() if pod.get("pvcMount", [{}])[0].get("pvcNameParameter") == name
    }
    assert mounting == TRAINING | {"open-volume"}
    for stage in TRAINING:
        assert {"createpvc", "open-volume"} <= set(dag["tasks"][stage]["dependentTasks"])
    assert set(dag["tasks"]["deletepvc"]["dependentTasks"]) == {"createpvc", "ppo"}
    opened = compiled.pods["open-volume"]
    assert compiled.containers["open-volume"]["command"] == ["chmod", "1777", "/checkpoints"]
    assert (
        opened["securityContext"]["runAsUser"] == "0" and opened["nodeSelector"] == compiled.pods["ppo"]["nodeSelector"]
    )
    assert not any(
        dag["tasks"][task]["cachingOptions"].get("enableCache") for task in ("createpvc", "open-volume", "deletepvc")
    )
    in_s3 = tiny(tmp_path / "s3", "cluster.checkpoint_volume={storage_class: fast}", "storage.checkpoint_uri=s3://b/c")
    assert "open-volume" not in in_s3.containers


@pytest.mark.parametrize("method", ["dpo", "both"])
def test_dpo_is_placed_as_a_training_stage_without_rollouts(method: str, tmp_path: Path) -> None:
    compiled = tiny(
        tmp_path, f"policy.method={method}", "cluster.stages={dpo: gke-gpu-24gb}", "storage.checkpoint_uri=s3://b/c"
    )
    policies = {"dpo"} if method == "dpo" else {"ppo", "dpo"}
    assert set(compiled.pods) & {"ppo", "dpo"} == policies
    pod, container = compiled.pods["dpo"], compiled.containers["dpo"]
    assert container["image"].startswith("kfp-rlhf/trainer:") and container["command"][2] == "components.dpo"
    assert container["resources"]["accelerator"]["resourceCount"] == "1"
    selector = {"nodeSelectorJson": {"componentInputParameter": "pipelinechannel--node_selector_gke_gpu_24gb"}}
    assert pod["nodeSelector"] == selector
    labels = pod["podMetadata"]["labels"]
    assert (labels["kfp-rlhf/stage"], labels["kfp-rlhf/process-group"]) == ("dpo", "true")
    assert "kfp-rlhf/egress" not in labels
    assert {"rlhf-s3", "rlhf-s3?"} <= set(compiled.secrets("dpo"))
    assert not compiled.tasks["dpo"]["cachingOptions"].get("enableCache")
    registers = {name for name in compiled.containers if name.startswith("register")}
    assert len(registers) == 2 * len(policies)  # of which the conditions leave one
    evaluations = {name for name in compiled.containers if name.startswith("evaluation")}
    assert {compiled.containers[name]["command"][2] for name in evaluations} == {"components.evaluation"}
    assert len(evaluations) == len(policies)


@pytest.mark.parametrize("method", ["dpo", "both"])
def test_policies_share_the_claim_of_a_run_one_after_the_other(method: str, tmp_path: Path) -> None:
    """Only one node at a time can mount it; it is deleted when both are trained."""
    compiled = tiny(tmp_path, f"policy.method={method}", "cluster.checkpoint_volume={storage_class: fast}")
    (dag,) = [dag for dag in compiled.dags if "createpvc" in dag["tasks"]]
    policies = {"dpo"} if method == "dpo" else {"ppo", "dpo"}
    mounting = {stage for stage, pod in compiled.pods.items() if "pvcMount" in pod}
    assert mounting == {"sft", "open-volume"} | policies | ({"reward-model"} if method == "both" else set())
    assert set(dag["tasks"]["deletepvc"]["dependentTasks"]) == {"createpvc", *policies}
    upstream = set(dag["tasks"]["dpo"]["dependentTasks"])
    assert {"createpvc", "open-volume"} < upstream and ("ppo" in upstream) == (method == "both")
    free = tiny(tmp_path / "free", "policy.method=both")
    (dag,) = [dag for dag in free.dags if "dpo" in dag["tasks"]]
    assert "ppo" not in dag["tasks"]["dpo"]["dependentTasks"]  # else both are trained at the same time


def test_notify_mounts_no_volume(tmp_path: Path) -> None:
    """It would be pending for ever where the volume is on nodes that it does not tolerate."""
    for number, override in enumerate(
        ("cluster.checkpoint_claim=shared", "cluster.checkpoint_volume={storage_class: fast}")
    ):
        assert "pvcMount" not in tiny(tmp_path / str(number), override).pods["notify"]


def test_scratch_leaves_tmp_to_the_launcher(tmp_path: Path) -> None:
    compiled = tiny(tmp_path, "cluster.profiles={cpu: {scratch: {size: 9Gi}}}")
    for stage, pod in compiled.pods.items():
        assert pod["emptyDirMounts"] == [{"volumeName": "scratch", "mountPath": "/scratch", "sizeLimit": "9Gi"}]
        variables = {e["name"]: e["value"] for e in compiled.containers[stage]["env"]}
        assert variables["TMPDIR"] == "/scratch" and variables["HF_HOME"].startswith("/scratch/")


def test_only_stages_that_use_s3_get_s3_credentials(tmp_path: Path) -> None:
    keys = {
        "rlhf-s3": (False, ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]),
        "rlhf-s3?": (True, ["AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION"]),
    }

    def users(name: str, *overrides: str) -> set[str]:
        compiled = tiny(tmp_path / name, *overrides)
        for stage in compiled.pods:
            s3 = {k: v for k, v in compiled.secrets(stage).items() if "s3" in k}
            assert s3 in ({}, keys), stage
        return {stage for stage in compiled.pods if "rlhf-s3" in compiled.secrets(stage)}

    assert users("none") == set()
    assert users("checkpoints", "storage.checkpoint_uri=s3://b/c") == TRAINING | {"notify"}
    assert users("publish", "storage.publish_uri=s3://b/m") == TRAINING
    assert users("model", "model.source=s3://b/model") == {"import-model"}
    assert users("data", "data.prompts.path=s3://b/prompts.jsonl", "data.prompts.format=jsonl") == {"prepare-data"}
    assert users("public", "model.source=s3://b/model", "storage.anonymous=true") == set()
    assert users("roles", "model.source=s3://b/model", "cluster.secrets.s3=null") == set()


def test_checkpoints_are_on_the_claim_or_in_s3(tmp_path: Path) -> None:
    def mounts(compiled: CompiledPipeline) -> dict[str, list[tuple[str, str]]]:
        return {
            stage: [(m["pvcNameParameter"]["runtimeValue"]["constant"], m["mountPath"]) for m in pod["pvcMount"]]
            for stage, pod in compiled.pods.items()
            if "pvcMount" in pod
        }

    def default_storage(compiled: CompiledPipeline) -> str:
        return compiled.spec["root"]["inputDefinitions"]["parameters"]["storage"]["defaultValue"]

    nowhere = tiny(tmp_path / "nowhere")
    assert mounts(nowhere) == {} and '"checkpoint_uri":null' in default_storage(nowhere)
    on_claim = tiny(tmp_path / "a", "cluster.checkpoint_claim=shared")
    assert mounts(on_claim) == {stage: [("shared", "/checkpoints")] for stage in TRAINING}
    assert '"checkpoint_uri":"/checkpoints"' in default_storage(on_claim)
    in_s3 = tiny(tmp_path / "b", "storage.checkpoint_uri=s3://bucket/c")
    assert mounts(in_s3) == {}
    nowhere = tiny(tmp_path / "c", "cluster.checkpoint_claim=null")
    assert mounts(nowhere) == {} and '"checkpoint_uri":null' in default_storage(nowhere)
    with_data = tiny(tmp_path / "d", "cluster.claims={/data: team-data}")
    assert {s for s, m in mounts(with_data).items() if ("team-data", "/data") in m} == {"import-model", "prepare-data"}


@pytest.mark.parametrize(
    ("overrides", "cached"),
    [
        ((), set()),  # a tag is mutable
        ((f"cluster.images.trainer=r.example/t@{DIGEST}",), {"import-model", "prepare-data", "judge"}),
        (
            (f"cluster.images.trainer=r.example/t@{DIGEST}", "model.source=meta-llama/Llama-3.1-8B"),
            {"prepare-data", "judge"},
        ),
        (
            (f"cluster.images.trainer=r.example/t@{DIGEST}", "cluster.stages={judge: gpu-24gb}"),
            {"import-model", "prepare-data"},
        ),
        (
            (f"cluster.images.trainer=r.example/t@{DIGEST}", "data.prompts={path: 's3://b/p.jsonl'}"),
            {"import-model", "judge"},
        ),
        (
            (
                f"cluster.images.trainer=r.example/t@{DIGEST}",
                f"data.prompts={{path: 's3://b/uploads/sha256-{'0' * 64}/p.jsonl'}}",
            ),
            {"import-model", "prepare-data", "judge"},
        ),
    ],
)
def test_only_deterministic_stages_with_immutable_inputs_are_cached(
    overrides: tuple[str, ...], cached: set[str], tmp_path: Path
) -> None:
    compiled = tiny(tmp_path, *overrides)
    assert {stage for stage, task in compiled.tasks.items() if task["cachingOptions"].get("enableCache")} == cached
    assert not any("cacheKey" in task["cachingOptions"] for task in compiled.tasks.values())


def test_labels_user_and_run_id_of_pods(eight: CompiledPipeline) -> None:
    for stage, pod in eight.pods.items():
        variables = {e["name"]: e["fieldPath"] for e in pod["fieldPathAsEnv"]}
        assert variables.pop("RLHF_RUN_ID") == "metadata.labels['pipeline/runid']"
        gpus = "8" if stage in GPU_STAGES else ""
        expected = {"RLHF_NUM_ACCELERATORS": "metadata.annotations['kfp-rlhf/num-accelerators']"} if gpus else {}
        assert variables == expected
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert pod["imagePullPolicy"] == "IfNotPresent"
        labels = {"app.kubernetes.io/part-of": "kfp-rlhf", "kfp-rlhf/stage": stage.removesuffix("-2")}
        hub = {"kfp-rlhf/egress": "hub"} if stage == "import-model" else {}  # its data is local files
        group = {"kfp-rlhf/process-group": "true"} if stage in GPU_STAGES else {}
        annotations = {"annotations": {"kfp-rlhf/num-accelerators": gpus}} if gpus else {}
        assert pod["podMetadata"] == {"labels": labels | hub | group} | annotations


def test_stages_without_torch_do_not_look_for_accelerators(tmp_path: Path) -> None:
    compiled = tiny(tmp_path, "cluster.default_profile=gpu-24gb")
    looking = {s for s, pod in compiled.pods.items() if "RLHF_NUM_ACCELERATORS" in str(pod["fieldPathAsEnv"])}
    assert looking == set(compiled.pods) - {"register", "register-2", "notify"}


def test_cluster_settings_of_a_params_file(tmp_path: Path) -> None:
    compiled = tiny(
        tmp_path,
        "cluster.profiles={mine: {like: gpu-80gb, accelerator: amd.com/gpu, num_accelerators: 2, cpu: 500m, memory: 1500Mi, "
        "shared_memory: 1Gi, scratch: {size: 200Gi, storage_class: fast}, queue: rlhf, labels: {team: nlp}, node_affinity: "
        "[{match_expressions: [{key: zone, values: [a]}], weight: 5}], tolerations: [{key: spot, operator: Equal, value: true}]}}",
        "cluster.stages={ppo: mine}",
        "cluster.image_pull_secrets=[registry]",
        "cluster.image_pull_policy=Always",
        "cluster.run_as_user=null",
        "cluster.mirrors={registry: r.example/team, pypi: 'https://p.example/simple', hub: 'https://h.example'}",
        "cluster.environment={HTTPS_PROXY: 'http://proxy:3128', NCCL_DEBUG: INFO}",
        "cluster.secrets={mlflow: null, webhook: null, hf_token: other}",
        "cluster.num_retries=1",
        "cluster.timeout_hours=0.5",
        "model.source=org/model",
    )
    pod, container = compiled.pods["ppo"], compiled.containers["ppo"]
    assert container["image"] == "r.example/team/kfp-rlhf/rollout:0.1.0"
    assert container["resources"]["accelerator"]["resourceType"] == "amd.com/gpu"
    assert container["resources"]["resourceCpuLimit"] == "500m"
    assert container["resources"]["resourceMemoryLimit"] == "2524Mi"  # 1500 + 1024
    (volume,) = pod["genericEphemeralVolume"]
    assert (volume["mountPath"], volume["size"], volume["storageClassName"]) == ("/scratch", "200Gi", "fast")
    assert pod["podMetadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "rlhf"
    assert pod["podMetadata"]["labels"]["team"] == "nlp"
    assert pod["nodeAffinity"][0]["weight"] == 5
    assert compiled.spec["root"]["inputDefinitions"]["parameters"]["tolerations_mine"]["defaultValue"] == [
        {"key": "spot", "operator": "Equal", "value": "true"}
    ]
    assert pod["activeDeadlineSeconds"] == "1800" and compiled.tasks["ppo"]["retryPolicy"]["maxRetryCount"] == 1
    assert "securityContext" not in pod and pod["imagePullPolicy"] == "Always"
    assert pod["imagePullSecret"][0]["secretNameParameter"]["runtimeValue"]["constant"] == "registry"
    environment = {s: {e["name"]: e["value"] for e in c["env"]} for s, c in compiled.containers.items()}
    everyone = {"HTTPS_PROXY": "http://proxy:3128", "NCCL_DEBUG": "INFO"}
    fetching = {"PIP_INDEX_URL": "https://p.example/simple", "HF_ENDPOINT": "https://h.example"}
    for stage, variables in environment.items():
        set_here = {k: v for k, v in variables.items() if k != SETTINGS_VARIABLE and not v.startswith("/scratch")}
        assert set_here == everyone | (fetching if stage in ("import-model", "prepare-data") else {})
    assert compiled.secrets("import-model") == {"other?": (True, ["HF_TOKEN"])}
    assert compiled.secrets("notify") == {}


def test_every_task_but_notify_knows_the_settings_of_the_run(eight: CompiledPipeline) -> None:
    params = load_params(ROOT / "pipelines/params/llama3_8b_8gpu.yaml")
    for stage, container in eight.containers.items():
        variables = {entry["name"]: entry["value"] for entry in container.get("env", [])}
        assert (SETTINGS_VARIABLE in variables) == (stage != "notify")
        assert stage == "notify" or Params.from_json(variables[SETTINGS_VARIABLE]) == params


def test_registry_mirror_keeps_images_with_a_registry(tmp_path: Path) -> None:
    images = "cluster.images={trainer: 'ghcr.io/me/t:1', rollout: 'localhost:5000/r:1', tools: 'me/x:1'}"
    compiled = tiny(tmp_path, images, "cluster.mirrors.registry=mirror:5000/")
    assert {c["image"] for c in compiled.containers.values()} == {
        "ghcr.io/me/t:1",
        "localhost:5000/r:1",
        "mirror:5000/me/x:1",
    }


@pytest.mark.parametrize("profile", sorted(builtin_profiles()))
def test_builtin_profiles_are_valid_and_set_num_processes(profile: str) -> None:
    params = load_params(TINY, [f"cluster.default_profile={profile}"])
    num = params.cluster.num_accelerators("ppo")
    assert num == (8 if "8x" in profile else 1 if "gpu" in profile else 0)
    assert [getattr(params, stage).training.num_processes for stage in ("sft", "reward_model", "ppo")] == [num or 1] * 3
    assert params.evaluation.num_processes == (num or 1)
    assert params.cluster.profile("ppo").tolerations if num else True


# --- the whole spec


def all_specs(eight: CompiledPipeline, folder: Path) -> list[CompiledPipeline]:
    return [
        eight,
        CompiledPipeline(load_params(MOVIES), folder / "m"),
        tiny(folder / "own", "sft.use=s3://b/s", "reward_model.use=s3://b/r"),
    ]


def test_specs_parse_strictly(eight: CompiledPipeline, tmp_path: Path) -> None:
    for compiled in all_specs(eight, tmp_path):
        json_format.ParseDict(compiled.spec, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)
        json_format.ParseDict(compiled.platform, pipeline_spec_pb2.PlatformSpec(), ignore_unknown_fields=False)
        for pod in compiled.pods.values():  # free-form structs in PlatformSpec
            json_format.ParseDict(
                pod, kubernetes_executor_config_pb2.KubernetesExecutorConfig(), ignore_unknown_fields=False
            )


def test_every_reference_resolves(eight: CompiledPipeline, tmp_path: Path) -> None:
    """The parser accepts dangling references to components, executors, inputs and outputs."""
    for compiled in all_specs(eight, tmp_path):
        components = compiled.spec["components"]
        labels = {c["executorLabel"].removeprefix("exec-") for c in components.values() if "executorLabel" in c}
        assert labels == set(compiled.containers) == set(compiled.pods) == set(compiled.tasks)
        assert {t["componentRef"]["name"] for dag in compiled.dags for t in dag["tasks"].values()} == set(components)
        for owner in [compiled.spec["root"], *(c for c in components.values() if "dag" in c)]:
            inputs = owner.get("inputDefinitions", {})
            for task in owner["dag"]["tasks"].values():
                check_task(task, owner["dag"]["tasks"], inputs, components)
                pod = compiled.pods.get(
                    components[task["componentRef"]["name"]].get("executorLabel", "").removeprefix("exec-"), {}
                )
                named = re.findall(r"'componentInputParameter': '([^']+)'", str(pod))
                assert set(named) <= set(inputs.get("parameters", {})), (task["taskInfo"]["name"], named)


def check_task(
    task: dict[str, Any], siblings: dict[str, Any], inputs: dict[str, Any], components: dict[str, Any]
) -> None:
    """Each input of a task is declared by its component, and comes from an input of the DAG or an output of a sibling."""
    component = components[task["componentRef"]["name"]]
    assert set(task.get("dependentTasks", [])) <= set(siblings)
    for kind in ("parameters", "artifacts"):
        given = task.get("inputs", {}).get(kind, {})
        assert set(given) <= set(component.get("inputDefinitions", {}).get(kind, {}))
        singular = kind.removesuffix("s").capitalize()
        for source in given.values():
            if f"componentInput{singular}" in source:
                assert source[f"componentInput{singular}"] in inputs[kind]
            elif f"taskOutput{singular}" in source:
                output = source[f"taskOutput{singular}"]
                producer = components[siblings[output["producerTask"]]["componentRef"]["name"]]
                assert output[f"output{singular}Key"] in producer["outputDefinitions"][kind]
            else:
                assert "runtimeValue" in source or source["taskFinalStatus"]["producerTask"] in siblings


# --- invalid parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "cluster.stages={ppo: gpu-80g}",
            "cluster.stages.ppo is gpu-80g, which is not a profile; did you mean gpu-80gb?",
        ),
        (
            "cluster.default_profile=nothing",
            "cluster.default_profile is nothing, which is not a profile; profiles: cpu, ",
        ),
        ("cluster.stages={poo: cpu}", "cluster: stages contains poo, which is not a stage; stages: import_model, "),
        (
            "cluster.profiles={a: {like: b}, b: {like: a}}",
            "a is like b is like a, which is a cycle; remove one `like`.",
        ),
        (
            "cluster.profiles={a: {memory: 12GB}}",
            "cluster.profiles.a.memory: '12GB' is not a valid quantity; write it like 64Gi.",
        ),
        ("cluster.profiles={a: {like: 1}}", "cluster.profiles.a.like is 1; it must be the name of a profile."),
        (
            "cluster.profiles={a: {cpu: 0}}",
            "cluster.profiles.a.cpu: 0 is not a valid quantity; write it like 4 or 500m.",
        ),
        ("cluster.profiles={a: {gpus: 2}}", "cluster.profiles.a.gpus is not a parameter; "),
        ("cluster.profiles={a: {tolerations: [{kye: x}]}}", "did you mean cluster.profiles.a.tolerations.0.key?"),
        (
            "cluster.profiles={a: {tolerations: [{key: x, value: y}]}}",
            "a toleration with a value needs the operator Equal",
        ),
        ("cluster.launcher=torchrun", "cluster.launcher is 'torchrun': input should be 'local' or 'trainjob'."),
        ("cluster.claims={data: x}", "cluster.claims: data is not a path that a volume can be mounted at"),
        ("cluster.image=x", "cluster.image is not a parameter; did you mean cluster.images?"),
    ],
)
def test_invalid_cluster_settings(override: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        load_params(TINY, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_num_processes_must_equal_the_accelerators_of_the_profile() -> None:
    with pytest.raises(
        InputError, match=r"ppo.training.num_processes is 4, and the profile gpu-8x80gb has 8 accelerators"
    ):
        load_params(TINY, ["cluster.stages={ppo: gpu-8x80gb}", "ppo.training.num_processes=4"])
    params = load_params(TINY, ["cluster.stages={ppo: cpu}", "ppo.training.num_processes=4"])
    assert params.ppo.training.num_processes == 4


def test_minibatch_must_fit_the_processes_of_the_profile() -> None:
    with pytest.raises(InputError, match="minibatch is 4, which 8 processes"):
        load_params(TINY, ["cluster.stages={ppo: gpu-8x80gb}", "ppo.minibatch=4"])


@pytest.mark.parametrize(
    ("overrides", "role"),
    [
        ((), "trainer"),
        (("ppo.rollout.engine=vllm",), "rollout"),
        (("ppo.rollout.engine=vllm", "reward_model.use=org/rm"), "rollout"),
        (("ppo.rollout.engine=vllm", "reward_model.num_calibration_samples=0"), "trainer"),
        (("evaluation.rollout={engine: vllm}",), "trainer"),
    ],
)
def test_reward_model_has_the_image_with_vllm_if_it_samples_with_it(
    overrides: tuple[str, ...], role: str, tmp_path: Path
) -> None:
    assert tiny(tmp_path, *overrides).containers["reward-model"]["image"] == f"kfp-rlhf/{role}:0.1.0"


def test_evaluation_has_as_many_processes_as_accelerators() -> None:
    params = load_params(TINY, ["cluster.stages={evaluation: gpu-8x80gb}"])
    assert params.stage(EvaluationStageConfig).processes.number == 8
    assert load_params(TINY, ["evaluation.num_processes=2"]).stage(EvaluationStageConfig).processes.number == 2
    with pytest.raises(
        InputError, match=r"evaluation.num_processes is 4, and the profile gpu-8x80gb has 8 accelerators; remove num_pr"
    ):
        load_params(TINY, ["cluster.stages={evaluation: gpu-8x80gb}", "evaluation.num_processes=4"])


def test_require_digests_rejects_an_image_without_a_digest() -> None:
    images = [f"cluster.images.{role}=r.example/{role}@{DIGEST}" for role in ("trainer", "rollout")]
    with pytest.raises(InputError, match=r"cluster.images.tools is kfp-rlhf/tools:0.1.0, which has no digest"):
        require_digests(load_params(TINY, [*images, "cluster.require_digests=true"]).cluster)
    images.append(f"cluster.images.tools=r.example/tools@{DIGEST}")
    require_digests(load_params(TINY, [*images, "cluster.require_digests=true"]).cluster)


def test_builtin_profile_can_be_overridden() -> None:
    params = load_params(TINY, ["cluster.profiles={gpu-80gb: {memory: 10Gi}}", "cluster.stages={ppo: gpu-80gb}"])
    profile = params.cluster.profile("ppo")
    assert (profile.memory, profile.shared_memory, profile.pod_memory) == ("10Gi", "16Gi", "26Gi")
    assert profile.tolerations[0].key == "nvidia.com/gpu"  # from gpu-24gb, the base of gpu-80gb
