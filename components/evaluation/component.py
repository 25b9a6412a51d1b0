"""KFP components of the stage evaluation, with and without a reward model, code of the user, another evaluation, and checks."""

from kfp import dsl
from kfp.dsl import HTML, Input, Markdown, Metrics, Output

from components.artifact_types import Checks, Code, Evaluation, Judge, Policy, Prompts, RewardModel, SftModel
from components.container import container_spec, variants


def _evaluation(
    sft_model: Input[SftModel],
    policy: Input[Policy],
    reward_model: Input[RewardModel],
    code: Input[Code],
    rival: Input[Evaluation],
    checks: Input[Checks],
    judge: Input[Judge],
    prompts: Input[Prompts],
    evaluation: Output[Evaluation],
    metrics: Output[Metrics],
    report: Output[HTML],
    summary: Output[Markdown],
    decision: dsl.OutputPath(str),
    reason: dsl.OutputPath(str),
    better: dsl.OutputPath(str),
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Compare a policy with the fine-tuned model on held-out prompts, using judges that it never sees, and decide on promotion.

    Args:
        sft_model: Fine-tuned model, the baseline of the comparison.
        policy: Model trained by PPO or DPO.
        reward_model: Reward model that PPO was trained with.
        code: Folder with the Python functions of judges.
        rival: Evaluation of the other policy of a run with two; the responses of the fine-tuned model are taken from it.
        checks: Checks beside the judge, which the policy must pass too.
        judge: Judges that compare the responses; the first one decides.
        prompts: Held-out prompts.
        evaluation: All numbers and responses of the comparison.
        metrics: Metrics of the stage.
        report: HTML page with tables, plots and sample responses.
        summary: Markdown summary of the decision and the metrics.
        decision: Decision of the gate, "promote" or "reject".
        reason: Reason for the decision.
        better: Method whose policy goes to the gate, "ppo" or "dpo".
        settings: Canonical JSON of EvaluationStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: answers of endpoint judges, and access to S3.
    """
    return container_spec("evaluation", "rollout", locals())


EVALUATION = variants(_evaluation, "reward_model", "code", "rival", "checks")
evaluation = EVALUATION[frozenset({"reward_model"})]
