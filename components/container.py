"""The container spec of a stage, whose command line is derived from the signature of its KFP component."""

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from components.rlhf.config.cluster import Images


def container_spec(stage: str, image: str, arguments: Mapping[str, Any]) -> dsl.ContainerSpec:
    """`python -m components.STAGE` with one option per argument, such as `--sft-model PATH`.

    arguments are the locals() of the component function: options receive the path of an artifact or the value of a parameter.
    image is the role of the image: trainer, rollout or tools. All stages with outputs (not notify) receive KFP's executor input.
    """
    args: list[Any] = []
    for name, value in arguments.items():
        args += [f"--{name.replace('_', '-')}", getattr(value, "path", value)]
    if stage != "notify":
        args += ["--executor-input", dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER]
    return dsl.ContainerSpec(image=getattr(Images(), image), command=["python", "-m", f"components.{stage}"], args=args)
