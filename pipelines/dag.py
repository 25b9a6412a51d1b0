"""The DAG.

import_model -> prepare_data -> sft -> reward_model -> ppo -> evaluation -> gate -> register
                            \\-> judge ----------------------/
and notify at the end, whether the run succeeds or fails. placement.py sets the image, node and resources of each task.
"""

from typing import Any

from kfp import dsl
from kfp.dsl import Artifact, Input, Model

from components.evaluation.component import evaluation
from components.import_model.component import import_model
from components.judge.component import judge
from components.notify.component import notify
from components.ppo.component import ppo
from components.prepare_data.component import prepare_data
from components.register.component import register
from components.reward_model.component import reward_model
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.register import RegisterStageConfig
from components.sft.component import sft
from pipelines import placement
from pipelines.settings import import_settings, settings_of_stage

NAME = "rlhf"


def build_pipeline(params: Params) -> Any:
    """The pipeline of a params file. Its inputs are the tracking and storage settings and the placement on GPU nodes."""
    selector, tolerations = placement.gpu_node_defaults(params)

    @dsl.pipeline(name="gate", description="Registers the policy; only a promoted one becomes champion.")
    def gate(decision: str, policy: Input[Model], verdict: Input[Artifact], tracking: str) -> None:
        # A nested pipeline, because kfp.local evaluates a condition on a component's named output as false.
        for branch in ("promote", "reject"):
            with dsl.If(decision == branch, name=branch):
                settings = RegisterStageConfig.model_validate({"decision": branch}).canonical_json()
                task = register(policy=policy, evaluation=verdict, settings=settings, tracking=tracking)
                placement.configure_task(task, "register", params)

    @dsl.pipeline(name=NAME, description="RLHF: SFT, reward model, PPO, held-out comparison, gate.")
    def rlhf(
        tracking: str = params.tracking.canonical_json(),
        storage: str = placement.cluster_storage(params).canonical_json(),
        gpu_node_selector: dict[str, str] = selector,
        gpu_tolerations: list[dict[str, str]] = tolerations,
    ) -> None:
        shared = {"tracking": tracking, "storage": storage}
        node_inputs = {"node_selector": gpu_node_selector, "tolerations": gpu_tolerations}

        def configure(task: Any, stage: str, name: str = "", source: str = "") -> Any:
            placement.configure_task(task, stage, params, source=source, node_inputs=node_inputs)
            return task.set_display_name(name or stage.replace("_", " "))

        def import_task(kind: Any, source: str, name: str, revision: str | None = None) -> Any:
            task = import_model(settings=import_settings(params, kind, source, revision), **shared)
            return configure(task, "import_model", name, source)

        settings = NotifyStageConfig(preset=params.preset, ui_url=params.cluster.ui_url).canonical_json()
        exit_task = configure(notify(settings=settings, **shared), "notify")
        with dsl.ExitHandler(exit_task, name="run"):
            import_model_task = import_task("base_model", params.model.source, "import model", params.model.revision)
            base_model = import_model_task.outputs["model"]

            prepare_data_task = prepare_data(
                base_model=base_model,
                settings=settings_of_stage(params, "prepare_data"),
                **shared,
            )
            datasets = configure(prepare_data_task, "prepare_data").outputs

            if params.sft.use:
                sft_task = import_task("sft_model", params.sft.use, "import SFT model")
            else:
                sft_task = sft(
                    base_model=base_model,
                    demonstrations=datasets["demonstrations"],
                    settings=settings_of_stage(params, "sft"),
                    **shared,
                )
                configure(sft_task, "sft", "SFT")
            sft_model = sft_task.outputs["model"]

            start_model = base_model
            if params.reward_model.use:
                start_model = import_task("reward_model", params.reward_model.use, "import reward model").outputs[
                    "model"
                ]
            reward_model_task = reward_model(
                base_model=start_model,
                sft_model=sft_model,
                preferences=datasets["preferences"],
                prompts=datasets["prompts"],
                settings=settings_of_stage(params, "reward_model"),
                **shared,
            )
            configure(reward_model_task, "reward_model")

            judge_task = judge(
                preferences=datasets["judge_preferences"],
                base_model=base_model,
                settings=settings_of_stage(params, "judge"),
                tracking=tracking,
            )
            configure(judge_task, "judge")

            ppo_task = ppo(
                sft_model=sft_model,
                reward_model=reward_model_task.outputs["model"],
                prompts=datasets["prompts"],
                settings=settings_of_stage(params, "ppo"),
                **shared,
            )
            configure(ppo_task, "ppo", "PPO")

            evaluation_task = evaluation(
                sft_model=sft_model,
                policy=ppo_task.outputs["model"],
                reward_model=reward_model_task.outputs["model"],
                judge=judge_task.outputs["judge"],
                prompts=datasets["heldout_prompts"],
                settings=settings_of_stage(params, "evaluation"),
                tracking=tracking,
            )
            configure(evaluation_task, "evaluation")

            gate(
                decision=evaluation_task.outputs["decision"],
                policy=ppo_task.outputs["model"],
                verdict=evaluation_task.outputs["evaluation"],
                tracking=tracking,
            )

    return rlhf
