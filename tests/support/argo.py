"""A model of the pods that Argo starts for one task of a compiled pipeline, given how each pod ends.

The rules are those of argo-workflows v4.0.8 (workflow/controller/operator.go: processNodeRetries, inferFailedReason,
mergedTemplateDefaultsInto) and kubeflow/pipelines 2.17 (backend/src/v2/compiler/argocompiler/container.go: a pod template with
the task's retryPolicy in an executor DAG). It is a model, not a test of a cluster.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

STOCK = """
spec:
  ttlStrategy:
    secondsAfterCompletion: 3600
    secondsAfterSuccess: 3600
    secondsAfterFailure: 3600
  templateDefaults:
    retryStrategy:
      limit: '2'
      retryPolicy: OnError
"""  # manifests/kustomize/third-party/argo/base/workflow-controller-configmap-patch.yaml of kubeflow/pipelines 2.17
# Templates around the pod of a task, from the inside: its executor DAG, the DAG in the exit handler, the root, the entrypoint.
LEVELS = ("executor", "exit-handler", "root", "entrypoint")


@dataclass(frozen=True)
class PodEnd:
    """How a pod ends: the phase and message of its node, and after how long."""

    phase: str  # Succeeded, Failed or Error
    message: str = ""
    seconds: float = 600.0


def exited(message: str, seconds: float = 600.0) -> PodEnd:
    """A stage that fails with this termination message: KFP's launcher exits with 1, whatever the stage's code."""
    return PodEnd("Failed", f"main: Error (exit code 1): {message}", seconds)


SUCCEEDED = PodEnd("Succeeded")
OOM_KILLED = PodEnd("Failed", "main: OOMKilled (exit code 137)")
EVICTED = PodEnd("Failed", "The node was low on resource: ephemeral-storage.")
NODE_SHUTDOWN = PodEnd("Failed", "Pod was terminated in response to imminent node shutdown.")
DEADLINE = PodEnd("Failed", "Pod was active on the node longer than the specified deadline")
DELETED = PodEnd("Error", "pod deleted")  # also by the garbage collection of a lost node


@dataclass
class Attempts:
    """What happened: pods of the task that were started, and the final phase."""

    pods: list[PodEnd] = field(default_factory=list)
    notified: int = 0
    phase: str = ""
    message: str = ""


def simulate(
    retry_policy: dict[str, Any] | None,
    defaults: dict[str, Any],
    ends: Callable[[int], PodEnd],
    *,
    max_pods: int = 1000,
) -> Attempts:
    """Run one task whose n-th pod ends as ends(n).

    retry_policy is the task's retryPolicy in the compiled spec; defaults is spec of workflowDefaults.
    """
    attempts, clock = Attempts(), [0.0]
    common = defaults.get("templateDefaults", {}).get("retryStrategy")

    def pod() -> PodEnd:
        end = ends(len(attempts.pods))
        attempts.pods.append(end)
        assert len(attempts.pods) <= max_pods, "pods are started for ever"
        clock[0] += end.seconds
        return end

    def level(number: int) -> PodEnd:
        """One attempt at a DAG; a failed DAG has the phase of its failed task, and no message."""
        inner = _retried(lambda: level(number - 1), common, clock) if number else _retried(pod, own, clock)
        if number == LEVELS.index("root"):
            attempts.notified += 1  # the exit hook of the exit handler
        return PodEnd(inner.phase)

    own = (common or {}) | _strategy_of(retry_policy) if retry_policy or common else None
    end = _retried(lambda: level(len(LEVELS) - 1), common, clock)
    attempts.phase = end.phase
    attempts.message = attempts.pods[-1].message
    return attempts


def _strategy_of(policy: dict[str, Any] | None) -> dict[str, Any]:
    """container.go getTaskRetryStrategyFromInput: no retryPolicy; backoffMaxDuration becomes maxDuration."""
    if not policy:
        return {}
    backoff = {
        "duration": _seconds(policy["backoffDuration"]),
        "factor": int(policy["backoffFactor"]),
        "maxDuration": _seconds(policy["backoffMaxDuration"]),
    }
    return {"limit": policy["maxRetryCount"], "backoff": backoff}


def _retried(run: Callable[[], PodEnd], strategy: dict[str, Any] | None, clock: list[float]) -> PodEnd:
    """processNodeRetries: run until it succeeds, or the strategy ends the retries."""
    started, count = clock[0], 0
    while True:
        end = run()
        count += 1
        if end.phase == "Succeeded" or strategy is None or not _is_retried(end, strategy, count, started, clock):
            return end


def _is_retried(end: PodEnd, strategy: dict[str, Any], count: int, started: float, clock: list[float]) -> bool:
    backoff = strategy.get("backoff")
    if backoff:
        wait = backoff["duration"] * backoff["factor"] ** (count - 1)
        if clock[0] + wait > started + backoff["maxDuration"]:
            return False
    expression = strategy.get("expression", "")
    policy = strategy.get("retryPolicy") or ("Always" if expression else "OnFailure")
    if not {"Always": True, "OnFailure": end.phase == "Failed", "OnError": end.phase == "Error"}[policy]:
        return False
    if count > int(strategy["limit"]):
        return False
    if expression and not evaluate(expression, end):
        return False
    if backoff:
        clock[0] += wait
    return True


def evaluate(expression: str, end: PodEnd) -> bool:
    """The part of Argo's expression language that manifests/argo-retries.yaml uses: not, and, contains."""
    python = re.sub(r'(lastRetry\.\w+) contains ("[^"]*")', r"(\2 in \1)", expression)

    class LastRetry:
        message, status = end.message, end.phase

    return bool(eval(python, {"__builtins__": {}}, {"lastRetry": LastRetry}))


def _seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


def always(end: PodEnd) -> Callable[[int], PodEnd]:
    return lambda _: end


def then_success(*ends: PodEnd) -> Callable[[int], PodEnd]:
    return lambda number: ends[number] if number < len(ends) else SUCCEEDED
