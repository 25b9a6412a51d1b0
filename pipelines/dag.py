"""The DAG.

import_model -> prepare_data -> sft -> reward_model -> ppo -> evaluation -> gate -> register
                            \\-> judge ----------------------/
and notify at the end, however it ends. Where each task runs, and with what, is placement.py.
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
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.judge import JudgeStageConfig
from components.rlhf.config.notify import NotifyStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.reward_model import RewardModelStageConfig
from components.rlhf.config.sft import SftStageConfig
from components.sft.component import sft
from pipelines import placement

NAME = "rlhf"


def build_pipeline(params: Params) -> Any:
    """The pipeline of one params file. Its inputs are where to track, where to store, and which GPU nodes to take."""
    selector, tolerations = placement.gpu_node_selector(params), placement.gpu_tolerations(params)

    @dsl.pipeline(name="gate", description="Registers either way; only what is promoted becomes champion.")
    def gate(decision: str, policy: Input[Model], verdict: Input[Artifact], tracking: str) -> None:
        # A nested pipeline, because a condition on a component's named output is silently false on a laptop.
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
        where = {"node_selector": gpu_node_selector, "tolerations": gpu_tolerations}

        def configure_task(task: Any, stage: str, name: str = "", source: str = "") -> Any:
            placement.configure_task(task, stage, params, source=source, where=where)
            return task.set_display_name(name or stage.replace("_", " "))

        def import_task(kind: str, source: str, name: str, revision: str | None = None) -> Any:
            settings = ImportModelStageConfig.model_validate({"kind": kind, "source": source, "revision": revision})
            task = import_model(settings=settings.canonical_json(), tracking=tracking, storage=storage)
            return configure_task(task, "import_model", name, source)

        settings = NotifyStageConfig(preset=params.preset, ui_url=params.cluster.ui_url).canonical_json()
        last = configure_task(notify(settings=settings, tracking=tracking, storage=storage), "notify")
        with dsl.ExitHandler(last, name="run"):
            base = import_task("base_model", params.model.source, "import model", params.model.revision)
            data = configure_task(
                prepare_data(
                    base_model=base.outputs["model"],
                    settings=params.stage(PrepareDataStageConfig).canonical_json(),
                    tracking=tracking,
                    storage=storage,
                ),
                "prepare_data",
            )

            if params.sft.use:
                tuned = import_task("sft_model", params.sft.use, "import SFT model")
            else:
                tuned = configure_task(
                    sft(
                        base_model=base.outputs["model"],
                        demonstrations=data.outputs["demonstrations"],
                        settings=params.stage(SftStageConfig).canonical_json(),
                        tracking=tracking,
                        storage=storage,
                    ),
                    "sft",
                    "SFT",
                )

            if params.reward_model.use:
                rewarder = import_task("reward_model", params.reward_model.use, "import reward model")
            else:
                rewarder = configure_task(
                    reward_model(
                        base_model=base.outputs["model"],
                        sft_model=tuned.outputs["model"],
                        preferences=data.outputs["preferences"],
                        prompts=data.outputs["prompts"],
                        settings=params.stage(RewardModelStageConfig).canonical_json(),
                        tracking=tracking,
                        storage=storage,
                    ),
                    "reward_model",
                )

            judging = configure_task(
                judge(
                    preferences=data.outputs["judge_preferences"],
                    base_model=base.outputs["model"],
                    settings=params.stage(JudgeStageConfig).canonical_json(),
                    tracking=tracking,
                ),
                "judge",
            )
            policy = configure_task(
                ppo(
                    sft_model=tuned.outputs["model"],
                    reward_model=rewarder.outputs["model"],
                    prompts=data.outputs["prompts"],
                    settings=params.stage(PpoStageConfig).canonical_json(),
                    tracking=tracking,
                    storage=storage,
                ),
                "ppo",
                "PPO",
            )
            verdict = configure_task(
                evaluation(
                    sft_model=tuned.outputs["model"],
                    policy=policy.outputs["model"],
                    reward_model=rewarder.outputs["model"],
                    judge=judging.outputs["judge"],
                    prompts=data.outputs["heldout_prompts"],
                    settings=params.stage(EvaluationStageConfig).canonical_json(),
                    tracking=tracking,
                ),
                "evaluation",
            )
            gate(
                decision=verdict.outputs["decision"],
                policy=policy.outputs["model"],
                verdict=verdict.outputs["evaluation"],
                tracking=tracking,
            )

    return rlhf
