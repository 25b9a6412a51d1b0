"""Settings of direct preference optimization (DPO) and its relatives."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig, Count, NonNegative, Positive, PositiveInt
from components.rlhf.config.budget import BudgetConfig
from components.rlhf.config.model import ModelConfig, Seed, TrainingConfig, check_zero3_compatibility
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.config.processes import Processes
from components.rlhf.config.storage import CheckpointConfig

PreferenceLoss = Literal["dpo", "ipo", "cdpo", "robust", "simpo", "kto"]
# The losses that use a setting, which all others would ignore.
USED_BY = {
    "label_smoothing": ("cdpo", "robust"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "reference_microbatch_tokens": ("dpo", "ipo", "cdpo", "robust", "kto"),
}


class DpoConfig(BaseConfig):
    """Direct preference optimization: the policy learns from preferences, without a reward model and without sampling."""

    loss: PreferenceLoss = "dpo"
    """dpo, ipo, cdpo and robust (for noisy labels) and simpo (without a reference) learn from pairs, kto from single labeled answers."""
    beta: Positive | None = None
    """Strength of the pull to the SFT model (ipo: its tau; simpo: scale of the reward); null is 0.1, and 2.0 for simpo."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed fraction of pairs whose preference is the wrong way round, for cdpo and robust."""
    simpo_gamma: NonNegative = 1.0
    """Margin that simpo wants between the rewards of chosen and rejected."""
    desirable_weight: Positive = 1.0
    """Weight of desirable answers in the loss kto."""
    undesirable_weight: Positive = 1.0
    """Weight of undesirable answers in the loss kto."""
    num_epochs: PositiveInt = 1
    """Number of epochs over the preference pairs, or the labeled answers."""
    max_steps: Count = 0
    """Maximum number of optimizer steps; 0 is unlimited."""
    batch_size: PositiveInt = 16
    """Preference pairs (kto: labeled answers) per optimizer step, over all processes."""
    reference_microbatch_tokens: PositiveInt | None = None
    """Maximum number of tokens in one forward pass of the reference, which has no gradients; null is training.microbatch_tokens."""
    training: TrainingConfig = TrainingConfig(learning_rate=5e-6)

    @property
    def strength(self) -> float:
        """beta, with the default of the loss."""
        if self.beta is not None:
            return self.beta
        return 2.0 if self.loss == "simpo" else 0.1

    @property
    def has_reference(self) -> bool:
        """Whether the loss compares the policy with the SFT model."""
        return self.loss != "simpo"

    @property
    def is_paired(self) -> bool:
        """Whether the loss learns from pairs, and not from single labeled answers."""
        return self.loss != "kto"

    @model_validator(mode="after")
    def _require_used_settings(self) -> "DpoConfig":
        for name, losses in USED_BY.items():
            if getattr(self, name) != DpoConfig.model_fields[name].default and self.loss not in losses:
                reason = "has no reference" if name.startswith("reference") else "does not use it"
                raise ValueError(
                    f"{name} is set, but loss {self.loss} {reason}; remove it, or set loss to {' or '.join(losses)}"
                )
        if self.loss in USED_BY["label_smoothing"] and not self.label_smoothing:
            raise ValueError(
                f"loss {self.loss} with label_smoothing 0 is dpo; set label_smoothing above 0, such as 0.1, or loss to dpo"
            )
        return self


def check_dpo(dpo: DpoConfig, data: DataConfig) -> None:
    """Raise ValueError for a loss without the data that it learns from. For a run that has the stage dpo."""
    if data.preferences is None:
        needed = "pairs of a better and a worse answer" if dpo.is_paired else "rated or labeled answers"
        raise ValueError(
            f"data.preferences is missing, and dpo.loss {dpo.loss} learns from {needed}, which it gives; set it"
        )
    if not dpo.is_paired and data.desirable_rating is None:
        raise ValueError(
            "dpo.loss is kto, which learns from single answers labeled as desirable or not, and data.desirable_rating, which labels "
            "them by their ratings, is not set; set it (0.5 for good/bad labels), or set dpo.loss to dpo, which learns from pairs"
        )


class DpoStageConfig(BaseConfig):
    model: ModelConfig
    dpo: DpoConfig
    checkpoint: CheckpointConfig
    budget: BudgetConfig = BudgetConfig()
    seed: Seed

    @property
    def processes(self) -> Processes:
        training = self.dpo.training
        return Processes(
            number=training.num_processes,
            key="dpo.training.num_processes",
            timeout_minutes=training.timeout_minutes,
        )

    @model_validator(mode="after")
    def _require_unshared_weights(self) -> "DpoStageConfig":
        check_zero3_compatibility(self.model, self.dpo.training)
        return self
