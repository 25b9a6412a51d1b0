"""KFP definition of sft."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output


@dsl.container_component
def sft(
    base_model: Input[Model],
    demonstrations: Input[Dataset],
    model: Output[Model],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Fine-tune the base model on demonstrations; prompts carry no loss.

    Args:
        base_model: Where training starts.
        demonstrations: What is learned.
        model: The fine-tuned model in the Hugging Face layout.
        metrics: Numbers of the stage.
        summary: The same for people.
        settings: Canonical JSON of SftStage.
        tracking: Canonical JSON of TrackingSettings.
        storage: Canonical JSON of StorageSettings: where checkpoints and published models lie, and how S3 is reached.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/trainer:0.1.0",
        command=["python", "-m", "components.sft"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--base-model",
            base_model.path,
            "--demonstrations",
            demonstrations.path,
            "--model",
            model.path,
            "--metrics",
            metrics.path,
            "--summary",
            summary.path,
            "--storage",
            storage,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
