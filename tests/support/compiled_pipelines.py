"""A compiled pipeline, by stage."""

from pathlib import Path
from typing import Any

import yaml

from components.rlhf.config.params import Params
from pipelines.compile import compile_pipeline


class CompiledPipeline:
    """Containers, pods and tasks of a compiled pipeline by executor: ppo, import-model, register-2."""

    def __init__(self, params: Params, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        text = compile_pipeline(params, folder / "p.yaml").read_text()
        self.spec, self.platform = yaml.load_all(text, Loader=yaml.CSafeLoader)
        self.containers = {
            name.removeprefix("exec-"): executor["container"]
            for name, executor in self.spec["deploymentSpec"]["executors"].items()
        }
        self.pods = {
            name.removeprefix("exec-"): pod
            for name, pod in self.platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].items()
        }
        dags = [self.spec["root"]["dag"], *(c["dag"] for c in self.spec["components"].values() if "dag" in c)]
        self.dags: list[dict[str, Any]] = dags
        self.tasks = {
            self.executor_of(task): task for dag in dags for task in dag["tasks"].values() if self.executor_of(task)
        }

    def executor_of(self, task: dict[str, Any]) -> str:
        component = self.spec["components"][task["componentRef"]["name"]]
        return component.get("executorLabel", "").removeprefix("exec-")

    def secrets(self, stage: str) -> dict[str, tuple[bool, list[str]]]:
        """Name of each Secret, with a ? if it is optional -> whether it is optional, and the keys that become variables."""
        secrets: dict[str, tuple[bool, list[str]]] = {}
        for secret in self.pods[stage].get("secretAsEnv", []):
            name = secret["secretNameParameter"]["runtimeValue"]["constant"]
            optional = secret.get("optional", False)
            secrets[f"{name}{'?' if optional else ''}"] = optional, [pair["secretKey"] for pair in secret["keyToEnv"]]
        return secrets
