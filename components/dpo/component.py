"""KFP component of the stage dpo."""

from kfp import dsl
from kfp.dsl import HTML, Input, Metrics, Output

from components.artifact_types import Policy, PolicyManifest, Preferences, SftModel
from components.container import container_spec


@dsl.container_component
def dpo(
    sft_model: Input[SftModel],
    preferences: Input[Preferences],
    model: Output[Policy],
    manifest: Output[PolicyManifest],
    metrics: Output[Metrics],
    report: Output[HTML],
    settings: str,
    tracking: str = "{}",
    storage: str = "{}",
) -> dsl.ContainerSpec:
    """Train the SFT model on preferences with DPO, IPO, cDPO, robust DPO, SimPO or KTO.

    Args:
        sft_model: SFT model, the start of the policy and the reference.
        preferences: Pairs to train on (kto: labeled answers), and held-out ones.
        model: Trained policy in the Hugging Face layout.
        manifest: Its manifest.json, for stages that need no weights.
        metrics: Metrics of the training, and on the held-out pairs.
        report: HTML page with the curves of the training.
        settings: Canonical JSON of DpoStageConfig.
        tracking: Canonical JSON of TrackingConfig.
        storage: Canonical JSON of StorageConfig: checkpoints, published models, and access to S3.
    """
    return container_spec("dpo", "trainer", locals())
