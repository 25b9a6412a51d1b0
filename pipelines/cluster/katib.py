"""A sweep as an Experiment of Katib, whose trials submit runs of the pipeline.

API: kubeflow.org/v1beta1, pkg/apis/controller/experiments/v1beta1/experiment_types.go of kubeflow/katib; the collector StdOut reads
lines NAME=VALUE.
"""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.access import MLFLOW_KEYS
from pipelines.cluster.evaluation import METRICS
from pipelines.cluster.server import ServerAccess
from pipelines.cluster.submit import DEFAULT_NAMESPACE, check_params
from pipelines.cluster.upload import local_sources
from pipelines.settings import dump_yaml, load_params
from pipelines.sweep import Axis, Point

FOLDER = "/sweep"
TOKEN_FOLDER, TOKEN_SECONDS = "/var/run/secrets/kubeflow/pipelines", 7200
COMPLETE = 'status.conditions.#(type=="Complete")#|#(status=="True")#'
FAILED = 'status.conditions.#(type=="Failed")#|#(status=="True")#'


def experiment_manifests(
    params: Params,
    points: Sequence[Point],
    axes: Sequence[Axis],
    access: ServerAccess,
    *,
    name: str,
    image: str,
    is_random: bool,
) -> str:
    """YAML of a ConfigMap with the parameters, and of the Experiment. params has what does not vary; points are planned ones.

    Katib chooses the points itself: all of a grid, or as many at random. Raises InputError for parameters that cannot work in its pods.
    """
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise InputError(
            f"--name {name!r} is not a name in Kubernetes of at most 40 characters; pass one such as rlhf-sweep."
        )
    for point in points:
        check_params(point.params)
        for key, path in local_sources(point.params).items():
            raise InputError(
                f"{key} is {path}, which the pods of Katib do not have; upload it, and set {key} to its address."
            )
    _require_same_points(params, points)
    num_points, namespace = len(points), access.namespace or DEFAULT_NAMESPACE
    metadata = {"name": name, "namespace": namespace}
    config_map = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"params.yaml": dump_yaml(params)}
    }  # fmt: skip
    names = [axis.key.replace(".", "-") for axis in axes]
    experiment = {
        "apiVersion": "kubeflow.org/v1beta1",
        "kind": "Experiment",
        "metadata": metadata,
        "spec": {
            "objective": {
                "type": "maximize",
                "objectiveMetricName": METRICS[0],
                "additionalMetricNames": list(METRICS[1:]),
            },
            "algorithm": {"algorithmName": "random" if is_random else "grid"},
            "metricsCollectorSpec": {"collector": {"kind": "StdOut"}},
            "maxTrialCount": num_points,
            "maxFailedTrialCount": num_points,
            "parallelTrialCount": 1,  # the cache of Kubeflow Pipelines has only stages that have finished
            "parameters": [_parameter(axis, own) for axis, own in zip(axes, names, strict=True)],
            "trialTemplate": {
                "primaryContainerName": "submit",
                "successCondition": COMPLETE,
                "failureCondition": FAILED,
                "trialParameters": [
                    {"name": "trial", "reference": "${trialSpec.Name}"},
                    *({"name": own, "reference": own} for own in names),
                ],
                "trialSpec": _job(params, axes, names, access, name=name, image=image),
            },
        },
    }
    return yaml.safe_dump_all([config_map, experiment], sort_keys=False, allow_unicode=True)


def _require_same_points(params: Params, points: Sequence[Point]) -> None:
    """Raise InputError if a point is another one when its settings are applied to the resolved parameters, as the trials do."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(dump_yaml(params), encoding="utf-8")
        for point in points:
            texts = [f"{key}={value}" for key, value in point.settings.items()]
            if load_params(file, texts).canonical_json() != point.params.canonical_json():
                raise InputError(
                    f"{', '.join(point.settings)}: a trial of Katib cannot set this, because other parameters follow from it; use "
                    "--host without --katib."
                )


def _parameter(axis: Axis, name: str) -> dict[str, Any]:
    if axis.values:
        return {"name": name, "parameterType": "categorical", "feasibleSpace": {"list": list(axis.values)}}
    low, high = (str(int(end)) if axis.is_integer else repr(end) for end in (axis.low, axis.high))
    space = {"min": low, "max": high, "distribution": "logUniform" if axis.is_log else "uniform"}
    return {"name": name, "parameterType": "int" if axis.is_integer else "double", "feasibleSpace": space}


def _job(
    params: Params, axes: Sequence[Axis], names: Sequence[str], access: ServerAccess, *, name: str, image: str
) -> dict[str, Any]:
    """The Job of a trial. It has no kubectl context, and a token of its ServiceAccount for Kubeflow Pipelines."""
    command = ["kfp-rlhf", "submit", f"{FOLDER}/params.yaml", "--host", access.host, "--wait", "--kube-context", ""]
    command += ["--namespace", access.namespace] if access.namespace else []
    command += ["--token-file", f"{TOKEN_FOLDER}/token", "--name", "${trialParameters.trial}"]
    for axis, own in zip(axes, names, strict=True):
        command += ["--set", f"{axis.key}=${{trialParameters.{own}}}"]
    secret = params.cluster.secrets.mlflow
    variables = [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}}}
        for key in MLFLOW_KEYS
    ]
    token = {"audience": "pipelines.kubeflow.org", "expirationSeconds": TOKEN_SECONDS, "path": "token"}
    container = {
        "name": "submit",
        "image": image,
        "command": command,
        "env": variables if secret and params.tracking.enabled else [],
        "volumeMounts": [
            {"name": "params", "mountPath": FOLDER, "readOnly": True},
            {"name": "token", "mountPath": TOKEN_FOLDER, "readOnly": True},
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "serviceAccountName": params.cluster.service_account,
        "containers": [container],
        "volumes": [
            {"name": "params", "configMap": {"name": name}},
            {"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}},
        ],
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "spec": {"backoffLimit": 0, "template": {"spec": pod}}}
