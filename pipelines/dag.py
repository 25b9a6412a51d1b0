"""The DAG.

import_model -> prepare_data -> sft -> reward_model -> ppo -> evaluation -> gate -> register
                            \\-> judge ----------------------/
"""

from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl import Artifact, Input, Model

from components.evaluation.component import evaluation
from components.import_model.component import import_model
from components.judge.component import judge
from components.ppo.component import ppo
from components.prepare_data.component import prepare_data
from components.register.component import register
from components.reward_model.component import reward_model
from components.rlhf.config.data import PrepareDataStage
from components.rlhf.config.evaluation import EvaluationStage
from components.rlhf.config.imports import ImportStage, RegisterStage
from components.rlhf.config.judge import JudgeStage
from components.rlhf.config.params import Params
from components.rlhf.config.ppo import PpoStage
from components.rlhf.config.reward_model import RewardModelStage
from components.rlhf.config.sft import SftStage
from components.sft.component import sft

NAME = "rlhf"


def build_pipeline(params: Params) -> Any:
    """The pipeline of one params file. Its inputs are where to track and where to store."""

    def place(task: Any) -> Any:
        """What every task is given by the platform; on a laptop the runner sets the same variable."""
        task.set_container_image(params.cluster.image)
        kubernetes.use_field_path_as_env(task, env_name="RLHF_RUN_ID", field_path="metadata.labels['pipeline/runid']")
        return task

    def bring(kind: str, source: str, tracking: str, storage: str, revision: str | None = None) -> Any:
        settings = ImportStage.model_validate({"kind": kind, "source": source, "revision": revision})
        return place(import_model(settings=settings.canonical_json(), tracking=tracking, storage=storage))

    @dsl.pipeline(name="gate", description="Registers either way; only what is promoted becomes champion.")
    def gate(decision: str, policy: Input[Model], verdict: Input[Artifact], tracking: str) -> None:
        # A nested pipeline, because a condition on a component's named output is silently false on a laptop.
        for branch in ("promote", "reject"):
            with dsl.If(decision == branch, name=branch):
                settings = RegisterStage.model_validate({"decision": branch}).canonical_json()
                place(register(policy=policy, evaluation=verdict, settings=settings, tracking=tracking))

    @dsl.pipeline(name=NAME, description="RLHF: SFT, reward model, PPO, held-out comparison, gate.")
    def rlhf(tracking: str = params.tracking.canonical_json(), storage: str = params.storage.canonical_json()) -> None:
        base = bring("base_model", params.model.source, tracking, storage, params.model.revision).set_display_name(
            "import model"
        )
        data = place(
            prepare_data(
                base_model=base.outputs["model"],
                settings=params.stage(PrepareDataStage).canonical_json(),
                tracking=tracking,
                storage=storage,
            )
        ).set_display_name("prepare data")

        if params.sft.use:
            tuned = bring("sft_model", params.sft.use, tracking, storage).set_display_name("import SFT model")
        else:
            tuned = place(
                sft(
                    base_model=base.outputs["model"],
                    demonstrations=data.outputs["demonstrations"],
                    settings=params.stage(SftStage).canonical_json(),
                    tracking=tracking,
                    storage=storage,
                )
            ).set_display_name("SFT")

        if params.reward_model.use:
            rewarder = bring("reward_model", params.reward_model.use, tracking, storage).set_display_name(
                "import reward model"
            )
        else:
            rewarder = place(
                reward_model(
                    base_model=base.outputs["model"],
                    sft_model=tuned.outputs["model"],
                    preferences=data.outputs["preferences"],
                    prompts=data.outputs["prompts"],
                    settings=params.stage(RewardModelStage).canonical_json(),
                    tracking=tracking,
                    storage=storage,
                )
            ).set_display_name("reward model")

        judging = place(
            judge(
                preferences=data.outputs["judge_preferences"],
                base_model=base.outputs["model"],
                settings=params.stage(JudgeStage).canonical_json(),
                tracking=tracking,
            )
        )
        policy = place(
            ppo(
                sft_model=tuned.outputs["model"],
                reward_model=rewarder.outputs["model"],
                prompts=data.outputs["prompts"],
                settings=params.stage(PpoStage).canonical_json(),
                tracking=tracking,
                storage=storage,
            )
        ).set_display_name("PPO")
        verdict = place(
            evaluation(
                sft_model=tuned.outputs["model"],
                policy=policy.outputs["model"],
                reward_model=rewarder.outputs["model"],
                judge=judging.outputs["judge"],
                prompts=data.outputs["heldout_prompts"],
                settings=params.stage(EvaluationStage).canonical_json(),
                tracking=tracking,
            )
        )
        gate(
            decision=verdict.outputs["decision"],
            policy=policy.outputs["model"],
            verdict=verdict.outputs["evaluation"],
            tracking=tracking,
        )

    return rlhf
