"""KFP component of the stage sft."""

from kfp import dsl
from kfp.dsl import Input, Markdown, Metrics, Output

from components.artifact_types import BaseModel, Demonstrations, SftModel
from components.container import container_spec


@dsl.container_component
def sft(
    base_model: Input[BaseModel],
    demonstrations: Input[Demonstrations],
    model: Output[SftModel],
    metrics: Output[Metrics],
    summary: Output[Markdown],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Fine-tune the base model on demonstrations; prompts carry no loss.

    Args:
        base_model: Model to fine-tune.
        demonstrations: Prompts with completions to learn, and held-out ones.
        model: Fine-tuned model in the Hugging Face layout.
        metrics: Losses before and after training.
        summary: The metrics as Markdown.
        settings: Canonical JSON of SftStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("sft", "trainer", locals())
