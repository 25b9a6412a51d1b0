"""KFP definition of evaluation."""

from kfp import dsl
from kfp.dsl import HTML, Artifact, Dataset, Input, Markdown, Metrics, Model, Output

from components.container import container_spec


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
        settings: Canonical JSON of EvaluationStageConfig.
        tracking: Canonical JSON of TrackingConfig.
    """
    return container_spec("evaluation", "rollout", locals())
