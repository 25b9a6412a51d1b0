"""KFP definition of prepare_data."""

from kfp import dsl
from kfp.dsl import HTML, Input, Markdown, Metrics, Output

from components.artifact_types import Demonstrations, Preferences, Prompts, Tokenizer
from components.container import container_spec


@dsl.container_component
def prepare_data(
    tokenizer: Input[Tokenizer],
    demonstrations: Output[Demonstrations],
    preferences: Output[Preferences],
    judge_preferences: Output[Preferences],
    prompts: Output[Prompts],
    heldout_prompts: Output[Prompts],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    report: Output[HTML],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Read, clean, split and pair the data: a data set for every stage, with no prompt in two roles.

    Args:
        tokenizer: Tokenizer of the base model, which counts tokens and renders chat templates.
        demonstrations: Demonstrations for supervised fine-tuning.
        preferences: Preference pairs for the reward model.
        judge_preferences: Ratings and pairs that only the judge is trained on.
        prompts: Training and validation prompts for PPO.
        heldout_prompts: Prompts used only for evaluation.
        metrics: Metrics of the stage.
        summary: Markdown summary of the data sets.
        report: HTML page with lengths and examples as the model sees them.
        settings: Canonical JSON of PrepareDataStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig, the access to S3.
    """
    return container_spec("prepare_data", "trainer", locals())
