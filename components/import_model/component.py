"""KFP definition of import_model."""

from kfp import dsl
from kfp.dsl import Model, Output

from components.container import container_spec


@dsl.container_component
def import_model(model: Output[Model], settings: str, tracking: str = "{}", storage: str = "{}") -> dsl.ContainerSpec:
    """Import a model from a folder, S3, the Hugging Face Hub or a Python package, so that later stages work offline.

    Args:
        settings: ImportModelStageConfig as JSON: kind, source and revision.
        tracking: TrackingConfig as JSON.
        storage: StorageConfig as JSON, for access to S3.
        model: Model in the Hugging Face format, with manifest.json.
    """
    return container_spec("import_model", "trainer", locals())
