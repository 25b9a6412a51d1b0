"""The whole DAG, task by task, in containers that look like pods (launcher.py), in the order of the compiled pipeline."""

from typing import Any

from tests.support.launcher import Artifact, Platform, TaskResult


def run_dag(platform: Platform) -> dict[str, TaskResult]:
    """Run every task until one fails, then notify. Returns the results by task."""
    spec = platform.compiled.spec
    parameters = {
        name: definition["defaultValue"] for name, definition in spec["root"]["inputDefinitions"]["parameters"].items()
    }
    results: dict[str, TaskResult] = {}
    (inner,) = [
        task for task in spec["root"]["dag"]["tasks"].values() if "exit-handler" in task["componentRef"]["name"]
    ]
    channels = {f"pipelinechannel--{name}": value for name, value in parameters.items()}
    try:
        succeeded = _run(platform, spec["components"][inner["componentRef"]["name"]]["dag"], channels, results)
    except BaseException:
        succeeded = False
        raise
    finally:
        notify = spec["root"]["dag"]["tasks"]["notify"]
        status = {
            "state": "SUCCEEDED" if succeeded else "FAILED",
            "pipelineJobResourceName": "job",
            "pipelineTaskName": "run",
        }
        results["notify"] = platform.run("notify", "notify", _inputs(notify, channels | parameters, {}, status))
    return results


def _run(platform: Platform, dag: dict[str, Any], channels: dict[str, Any], results: dict[str, TaskResult]) -> bool:
    """Run the tasks of one DAG; return whether all have succeeded."""
    components, pending = platform.compiled.spec["components"], dict(dag["tasks"])
    outputs: dict[str, TaskResult] = {}
    while pending:
        name = next(n for n, task in pending.items() if not set(task.get("dependentTasks", [])) & set(pending))
        task = pending.pop(name)
        component = components[task["componentRef"]["name"]]
        inputs = _inputs(task, channels, outputs)
        if "dag" in component:
            condition = task.get("triggerPolicy", {}).get("condition", "")
            if condition and not _holds(condition, inputs):
                continue
            if not _run(platform, component["dag"], inputs, results):
                return False
            continue
        executor = component["executorLabel"].removeprefix("exec-")
        outputs[name] = results[executor] = platform.run(executor, executor, inputs)
        if outputs[name].exit_code:
            return False
    return True


def _inputs(
    task: dict[str, Any], channels: dict[str, Any], outputs: dict[str, TaskResult], status: Any = None
) -> dict[str, Any]:
    """resolve.go of the driver: constants, inputs of the DAG, and outputs of other tasks."""
    values: dict[str, Any] = {}
    for name, source in task.get("inputs", {}).get("parameters", {}).items():
        if "runtimeValue" in source:
            values[name] = source["runtimeValue"]["constant"]
        elif "componentInputParameter" in source:
            values[name] = channels[source["componentInputParameter"]]
        elif "taskFinalStatus" in source:
            values[name] = status
        else:
            found = source["taskOutputParameter"]
            values[name] = outputs[found["producerTask"]].parameters[found["outputParameterKey"]]
    for name, source in task.get("inputs", {}).get("artifacts", {}).items():
        artifact: Artifact
        if "componentInputArtifact" in source:
            artifact = channels[source["componentInputArtifact"]]
        else:
            found = source["taskOutputArtifact"]
            artifact = outputs[found["producerTask"]].artifacts[found["outputArtifactKey"]]
        values[name] = artifact
    return values


def _holds(condition: str, inputs: dict[str, Any]) -> bool:
    """`inputs.parameter_values['NAME'] == 'VALUE'`, the only form of condition in the DAG."""
    name, _, value = condition.partition(" == ")
    return bool(inputs[name.removeprefix("inputs.parameter_values['").removesuffix("']")] == value.strip("'"))
