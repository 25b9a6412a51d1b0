"""KFP components of the stage checks, with and without code of the user."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output

from components.artifact_types import Checks, Code, Demonstrations, Policy, Prompts, SftModel
from components.container import container_spec, variants


def _checks(
    sft_model: Input[SftModel],
    policy: Input[Policy],
    demonstrations: Input[Demonstrations],
    prompts: Input[Prompts],
    code: Input[Code],
    checks: Output[Checks],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Compare a policy with the fine-tuned model on the checks of the gate: perplexity, prompts of your own, lm-evaluation-harness.

    Args:
        sft_model: Fine-tuned model, the baseline of the comparison.
        policy: Model trained by PPO or DPO.
        demonstrations: Demonstrations, of which the held-out ones are used.
        prompts: Held-out prompts, which say whether the run uses the chat template.
        code: Folder with tasks of lm-evaluation-harness.
        checks: Rows of all checks, and the answers to their prompts.
        metrics: Metrics of the stage.
        summary: Markdown table of the checks.
        settings: Canonical JSON of ChecksStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: answers of endpoints, and access to S3.
    """
    return container_spec("checks", "trainer", locals())


CHECKS = variants(_checks, "code")
checks = CHECKS[frozenset()]
