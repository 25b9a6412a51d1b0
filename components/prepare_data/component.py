"""KFP definition of prepare_data."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output


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
        settings: Canonical JSON of PrepareDataStage.
        tracking: Canonical JSON of TrackingSettings.
        storage: Canonical JSON of StorageSettings: how S3 is reached.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/trainer:0.1.0",
        command=["python", "-m", "components.prepare_data"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--storage",
            storage,
            "--base-model",
            base_model.path,
            "--demonstrations",
            demonstrations.path,
            "--preferences",
            preferences.path,
            "--judge-preferences",
            judge_preferences.path,
            "--prompts",
            prompts.path,
            "--heldout-prompts",
            heldout_prompts.path,
            "--metrics",
            metrics.path,
            "--summary",
            summary.path,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
