"""KFP definition of prepare_data."""

from kfp import dsl
from kfp.dsl import HTML, Dataset, Input, Markdown, Metrics, Model, Output

from components.container import container_spec


@dsl.container_component
def prepare_data(
    base_model: Input[Model],
    demonstrations: Output[Dataset],
    preferences: Output[Dataset],
    judge_preferences: Output[Dataset],
    prompts: Output[Dataset],
    heldout_prompts: Output[Dataset],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    report: Output[HTML],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Read, clean, split and pair the data: a data set for every stage, with no prompt in two roles.

    Args:
        base_model: Base model, whose tokenizer counts tokens and renders chat templates.
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
