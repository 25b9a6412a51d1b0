"""Tasks of lm-evaluation-harness under both models: the metric of each sample, so that the difference is a paired one."""

import contextlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from components.checks.bounds import Measured
from components.checks.models import Models
from components.rlhf.config.checks import LmEvalCheck
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.text.errors import InputError

TOLERANCE = 1e-6  # between the mean over samples and the metric that the harness reports


def require_harness() -> None:
    """Raise InputError if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "gate.checks has a check of kind lm_eval, and lm-evaluation-harness is not installed here; install the extra evals "
            "(lm_eval), in the image of the stage checks, or remove the check."
        )


def measure_tasks(check: LmEvalCheck, models: Models, code: Path | None) -> list[Measured]:
    """The metric of every sample of every task, with the sign that makes more of it better. Raises InputError."""
    folder = _tasks_folder(check, code)
    found = []
    with contextlib.chdir(code) if folder and code else contextlib.nullcontext():
        manager = _task_manager(check, folder)
        for name, model in models.folders.items():
            models.progress.log(f"check {check.title}: {', '.join(check.tasks)} with the {name} model")
            found.append(run_harness(check, models, model, manager))
    first, second = (values_of(results, check.metric) for results in found)
    name = check.metric.partition(",")[0]
    if {task: list(own) for task, own in first.items()} != {task: list(own) for task, own in second.items()}:
        raise InputError("the harness used other samples for the second model")
    return [
        Measured(
            check=check.title,
            item=task,
            unit=name if found[0]["higher_is_better"][task][name] else f"-{name}",
            sft=np.array(list(own.values())),
            policy=np.array(list(second[task].values())),
        )
        for task, own in first.items()
    ]


def _tasks_folder(check: LmEvalCheck, code: Path | None) -> Path | None:
    """The absolute path of include_path."""
    if check.include_path is None:
        return None
    folder = (code / check.include_path).resolve() if code else None
    if folder is None or code is None or not folder.is_dir() or not folder.is_relative_to(code.resolve()):
        raise InputError(f"include_path {check.include_path} is not a folder in code.path")
    return folder


def _task_manager(check: LmEvalCheck, folder: Path | None) -> Any:
    """What finds the tasks: in the folder if all of them are there, else also among the thousands of the harness, which takes longer."""
    from lm_eval.tasks import TaskManager

    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    return own if set(check.tasks) <= set(own.all_tasks) else TaskManager(include_path=str(folder))


def run_harness(check: LmEvalCheck, models: Models, model: Path, manager: Any) -> Mapping[str, Any]:
    """The results of one model. Raises InputError for whatever goes wrong in a task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    lm = models.load(model)
    try:
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=lm, tokenizer=load_tokenizer(model), batch_size=check.batch_size),
            tasks=list(check.tasks),
            task_manager=manager,
            num_fewshot=check.num_fewshot,
            limit=check.limit,
            bootstrap_iters=0,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tasks are programs, and can raise anything
        reason = (str(error).splitlines() or [""])[0][:300]
        raise InputError(f"lm-evaluation-harness fails ({type(error).__name__}: {reason})") from error
    finally:
        del lm
        models.release()
    if not results or not results.get("samples"):
        raise InputError("lm-evaluation-harness has no samples of these tasks")
    return dict(results)


def values_of(results: Mapping[str, Any], metric: str) -> dict[str, dict[int, float]]:
    """By task and number of the sample: the metric, negated where lower is better. metric is NAME or NAME,FILTER.

    Raises InputError for a task without this metric, and for a metric that is not a mean of its values over the samples.
    """
    name, _, wanted = metric.partition(",")
    values: dict[str, dict[int, float]] = {}
    for task, samples in results["samples"].items():
        filters = {sample["filter"] for sample in samples if name in sample["metrics"]}
        if not filters:
            known = sorted({each for sample in samples for each in sample["metrics"]})
            raise InputError(f"the task {task} has no metric {name} (it has {', '.join(known) or 'none'})")
        if wanted not in filters and (wanted or len(filters) > 1):
            raise InputError(
                f"the task {task} has {name} with the filters {', '.join(sorted(filters))}; write {name},FILTER"
            )
        chosen = wanted or filters.pop()
        own = {sample["doc_id"]: sample[name] for sample in samples if sample["filter"] == chosen}
        values[task] = _signed(
            task, name, own, results["results"][task][f"{name},{chosen}"], results["higher_is_better"][task].get(name)
        )
    return values


def _signed(
    task: str, name: str, own: Mapping[int, Any], reported: Any, higher_is_better: bool | None
) -> dict[int, float]:
    if higher_is_better is None:
        raise InputError(f"the task {task} does not say whether a higher {name} is better (higher_is_better)")
    if not all(isinstance(value, int | float | np.number) for value in own.values()) or not _is_mean(
        list(own.values()), reported
    ):
        raise InputError(
            f"{name} of the task {task} is not a mean over its samples, so that its difference has no interval"
        )
    sign = 1.0 if higher_is_better else -1.0
    return {number: sign * float(own[number]) for number in sorted(own)}


def _is_mean(values: Sequence[float], reported: Any) -> bool:
    return isinstance(reported, int | float | np.number) and abs(float(np.mean(values)) - float(reported)) <= TOLERANCE
