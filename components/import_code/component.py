"""KFP definition of import_code."""

from kfp import dsl
from kfp.dsl import Output

from components.artifact_types import Code
from components.container import container_spec


@dsl.container_component
def import_code(
    code: Output[Code],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Make an artifact of the folder with the user's Python functions, so that its digest is in the lineage.

    Args:
        code: The folder.
        settings: Canonical JSON of ImportCodeStageConfig, which may contain the folder.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig, the access to S3.
    """
    return container_spec("import_code", "tools", locals())
