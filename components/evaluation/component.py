"""KFP definition of evaluation."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output


@dsl.container_component
def evaluation(
    sft_model: Input[Model],
    policy: Input[Model],
    reward_model: Input[Model],
    judge: Input[Artifact],
    prompts: Input[Dataset],
    evaluation: Output[Artifact],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    decision: dsl.OutputPath(str),
    reason: dsl.OutputPath(str),
    settings: str,
    tracking: str = "{}",
) -> dsl.ContainerSpec:
    """Compare PPO with the fine-tuned model on held-out prompts, by a judge that PPO never saw, and decide on promotion.

    Args:
        sft_model: The one to beat.
        policy: The one that PPO trained.
        reward_model: What PPO was trained against, beside the judge.
        judge: Who decides.
        prompts: Held-out prompts.
        evaluation: All numbers and all answers.
        metrics: Numbers of the stage.
        report: Table, picture and samples.
        summary: The same for people.
        decision: promote or reject.
        reason: Why, in one sentence.
        settings: Canonical JSON of EvaluationStage.
        tracking: Canonical JSON of TrackingSettings.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/rollout:0.1.0",
        command=["python", "-m", "components.evaluation"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--sft-model",
            sft_model.path,
            "--policy",
            policy.path,
            "--reward-model",
            reward_model.path,
            "--judge",
            judge.path,
            "--prompts",
            prompts.path,
            "--evaluation",
            evaluation.path,
            "--metrics",
            metrics.path,
            "--report",
            report.path,
            "--summary",
            summary.path,
            "--decision",
            decision,
            "--reason",
            reason,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
