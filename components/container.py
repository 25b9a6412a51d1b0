"""The container spec of a stage, whose command line is derived from the signature of its KFP component."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from itertools import combinations
from typing import Any

from kfp import dsl

from components.rlhf.config.cluster import Images


def container_spec(stage: str, image: str, arguments: Mapping[str, Any]) -> dsl.ContainerSpec:
    """`python -m components.STAGE` with one option per argument, such as `--sft-model PATH`.

    arguments are the locals() of the component function: options receive the path of an artifact or the value of a parameter; None is an
    input that a variant does not have. image is the role of the image: trainer, rollout or tools. All stages with outputs (not notify)
    receive KFP's executor input.
    """
    args: list[Any] = []
    for name, value in arguments.items():
        if value is not None:
            args += [f"--{name.replace('_', '-')}", getattr(value, "path", value)]
    if stage != "notify":
        args += ["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER]
    return dsl.ContainerSpec(image=getattr(Images(), image), command=["python", "-m", f"components.{stage}"], args=args)


def variants(function: Callable[..., dsl.ContainerSpec], *optional: str) -> dict[frozenset[str], Any]:
    """The component of a function _NAME with every subset of its optional input artifacts, by the names of those that it has.

    All are named NAME, and so are their tasks. Optional inputs of one component would do, but the backend of Kubeflow
    Pipelines before 2.17.1 takes every optional input artifact for missing (kubeflow/pipelines#14175).
    """
    subsets = [frozenset(names) for size in range(len(optional) + 1) for names in combinations(optional, size)]
    return {given: dsl.container_component(_without(function, set(optional) - given)) for given in subsets}


def _without(function: Callable[..., dsl.ContainerSpec], names: set[str]) -> Callable[..., dsl.ContainerSpec]:
    """The function with these parameters set to None, and no longer in its signature."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in names]
    signature = inspect.Signature(parameters, return_annotation=dsl.ContainerSpec)

    @wraps(function)
    def shorter(*values: Any) -> dsl.ContainerSpec:
        return function(**signature.bind(*values).arguments, **dict.fromkeys(names))

    shorter.__name__ = function.__name__.removeprefix("_")
    shorter.__signature__ = signature  # type: ignore[attr-defined]
    return shorter
