"""KFP definition of sft."""

from kfp import dsl
from kfp.dsl import Dataset, Input, Markdown, Metrics, Model, Output

from components.container import container_spec


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
        settings: Canonical JSON of SftStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: where checkpoints and published models lie, and how S3 is reached.
    """
    return container_spec("sft", "trainer", locals())
