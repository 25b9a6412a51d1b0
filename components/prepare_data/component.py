"""KFP definition of prepare_data."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output

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
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Read, clean, split and pair the data: typed data sets for every stage, with no prompt in two of them.

    Args:
        base_model: Its tokenizer counts tokens and renders chat templates.
        demonstrations: For supervised fine-tuning.
        preferences: Pairs for the reward model.
        judge_preferences: Ratings and pairs for the judge alone.
        prompts: For PPO.
        heldout_prompts: For evaluation alone.
        metrics: Numbers of the stage.
        summary: The same for people.
        settings: Canonical JSON of PrepareDataStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: how S3 is reached.
    """
    return container_spec("prepare_data", "trainer", locals())
