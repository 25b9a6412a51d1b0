"""The TrainJob object of a stage: its name, its specification, and the digest by which another attempt knows it again."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.rlhf.config.trainjob import CONTAINER, DIGEST_VARIABLE, TrainJobPlan
from components.rlhf.trainjob.api import GROUP, Object

DIGEST_ANNOTATION, RUN_ANNOTATION = "kfp-rlhf/trainjob-digest", "kfp-rlhf/run-id"
RUN_LABEL = "pipeline/runid"  # as on the pods of Kubeflow Pipelines
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"

MANAGER = "kfp-rlhf/launcher"
# Kubernetes requires at most 63 characters of the names of pods, NAME-node-0-INDEX-xxxxx.
MAX_STAGE_CHARS, HASH_CHARS = 24, 10


@dataclass(frozen=True, kw_only=True)
class StageCall:
    """What the pods of a stage run."""

    stage: str  # its name in this run: judge_reward_model is a second reward_model
    module: str
    run_id: str
    num_processes: int
    options: Sequence[str]  # of the command line, whose content decides whether a running job is the same
    executor_input: str  # differs between two tasks of KFP for the same stage, which may share a job
    environment: Mapping[str, str]
    owner: Object | None  # an owner reference


def job_name(run_id: str, stage: str) -> str:
    """A name for the TrainJob of one stage in one run: an RFC 1035 label, the same for each attempt."""
    digest = hashlib.sha256(f"{run_id}\n{stage}".encode()).hexdigest()[:HASH_CHARS]
    words = re.sub("[^a-z0-9]+", "-", stage.lower())[:MAX_STAGE_CHARS].strip("-")
    return "-".join(filter(None, ["rlhf", words, digest]))


def nodes_and_processes(plan: TrainJobPlan, num_processes: int) -> tuple[int, int]:
    """Number of nodes, and of processes on each: a stage that trains nothing has one process, and needs one node."""
    nodes = min(plan.num_nodes, num_processes)
    return nodes, num_processes // nodes


def trainjob(plan: TrainJobPlan, call: StageCall) -> Object:
    """The TrainJob, whose annotation has the digest of its specification without the executor input."""
    nodes, per_node = nodes_and_processes(plan, call.num_processes)
    spec: Object = {
        "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": plan.runtime},
        "activeDeadlineSeconds": plan.deadline_seconds,
        "trainer": {
            "image": plan.image,
            "command": ["python", "-m", call.module],
            "args": [*map(_literal, call.options)],
            "env": [
                *(entry for entry in plan.environment if entry["name"] not in (*call.environment, DIGEST_VARIABLE)),
                *({"name": k, "value": v} for k, v in call.environment.items()),
            ],
            "numNodes": nodes,
            "numProcPerNode": per_node,
            "resourcesPerNode": {"requests": dict(plan.resources), "limits": dict(plan.resources)},
        },
        "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": {"template": {"spec": _pod_patch(plan, call)}}}],
    }
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
    spec["trainer"]["env"].append({"name": DIGEST_VARIABLE, "value": digest})
    spec["trainer"]["args"] += ["--executor-input", _literal(call.executor_input)]
    name = job_name(call.run_id, call.stage)
    metadata: Object = {
        "name": name,
        "labels": _labels(plan, call) | ({QUEUE_LABEL: plan.queue} if plan.queue else {}),
        "annotations": {DIGEST_ANNOTATION: digest, RUN_ANNOTATION: f"{call.run_id}/{call.stage}"},
    }
    if call.owner:
        metadata["ownerReferences"] = [call.owner]
    return {"apiVersion": f"{GROUP}/v1alpha1", "kind": "TrainJob", "metadata": metadata, "spec": spec}


def digest_of(job: Object) -> str:
    return str((job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION, ""))


def run_and_stage_of(job: Object) -> str:
    return str((job["metadata"].get("annotations") or {}).get(RUN_ANNOTATION, ""))


def _labels(plan: TrainJobPlan, call: StageCall) -> dict[str, str]:
    return dict(plan.labels) | ({RUN_LABEL: call.run_id} if is_label(call.run_id) else {})


def is_label(text: str) -> bool:
    """Whether a text can be the value of a label."""
    return re.fullmatch("[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", text) is not None


def _pod_patch(plan: TrainJobPlan, call: StageCall) -> Object:
    """The patch of the runtime's JobSet. Its pods have the label of the queue only through Kueue, which admits the job as a whole."""
    metadata: Object = {"labels": _labels(plan, call)}
    if plan.annotations:
        metadata["annotations"] = dict(plan.annotations)
    pod: dict[str, Any] = dict(plan.pod)
    if plan.volume_mounts:
        pod["containers"] = [{"name": CONTAINER, "volumeMounts": list(plan.volume_mounts)}]
    template = {"metadata": metadata, "spec": pod}
    return {"replicatedJobs": [{"name": CONTAINER, "template": {"spec": {"template": template}}}]}


def _literal(argument: str) -> str:
    """An argument in which Kubernetes replaces no $(NAME)."""
    return argument.replace("$(", "$$(")
