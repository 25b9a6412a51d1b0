"""KFP definition of import_model."""

from kfp import dsl
from kfp.dsl import Model, Output

from components.container import container_spec


@dsl.container_component
def import_model(model: Output[Model], settings: str, tracking: str = "{}", storage: str = "{}") -> dsl.ContainerSpec:
    """Bring a model in from a folder, a hub or a package, as an artifact that every later stage reads offline.

    Args:
        settings: Canonical JSON of ImportModelStageConfig: kind, source, revision.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: how S3 is reached.
        model: The model in the Hugging Face layout, with manifest.json.
    """
    return container_spec("import_model", "trainer", locals())
