"""KFP definition of import_model."""

from kfp import dsl
from kfp.dsl import Model, Output


@dsl.container_component
def import_model(model: Output[Model], settings: str, tracking: str = "{}", storage: str = "{}") -> dsl.ContainerSpec:
    """Bring a model in from a folder, a hub or a package, as an artifact that every later stage reads offline.

    Args:
        settings: Canonical JSON of ImportStage: kind, source, revision.
        tracking: Canonical JSON of TrackingSettings.
        storage: Canonical JSON of StorageSettings: how S3 is reached.
        model: The model in the Hugging Face layout, with manifest.json.
    """
    return dsl.ContainerSpec(
        image="kfp-rlhf/trainer:0.1.0",
        command=["python", "-m", "components.import_model"],
        args=[
            "--settings",
            settings,
            "--tracking",
            tracking,
            "--storage",
            storage,
            "--model",
            model.path,
            "--executor-input",
            dsl.PIPELINE_TASK_EXECUTOR_INPUT_PLACEHOLDER,
        ],
    )
