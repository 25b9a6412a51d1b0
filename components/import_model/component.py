"""KFP definitions of import_model, one for each kind of model that it imports."""

from kfp import dsl
from kfp.dsl import Output

from components.artifact_types import BaseModel, RewardModel, SftModel, Tokenizer
from components.container import container_spec


@dsl.container_component
def import_model(
    model: Output[BaseModel],
    tokenizer: Output[Tokenizer],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Import a model from a folder, S3, the Hugging Face Hub or a Python package, so that later stages work offline.

    Args:
        settings: ImportModelStageConfig as JSON: kind, source and revision.
        tracking: TrackingConfig as JSON.
        storage: StorageConfig as JSON, for access to S3.
        model: Model in the Hugging Face format, with manifest.json.
        tokenizer: The files of the model without its weights.
    """
    return container_spec("import_model", "trainer", locals())


@dsl.container_component
def import_sft_model(
    model: Output[SftModel],
    tokenizer: Output[Tokenizer],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Import a fine-tuned model in place of SFT; arguments as for import_model."""
    return container_spec("import_model", "trainer", locals())


@dsl.container_component
def import_reward_model(
    model: Output[RewardModel],
    tokenizer: Output[Tokenizer],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Import a reward model in place of its training; arguments as for import_model."""
    return container_spec("import_model", "trainer", locals())
