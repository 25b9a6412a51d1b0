"""Which method trains the policy of a run."""

from typing import Literal

from components.rlhf.config.base import BaseConfig

Method = Literal["ppo", "dpo"]
TITLES: dict[str, str] = {"ppo": "PPO", "dpo": "DPO"}


class PolicyConfig(BaseConfig):
    """How the policy is trained from the SFT model."""

    method: Literal["ppo", "dpo", "both"] = "ppo"
    """ppo: with rewards; dpo: on preferences alone (section dpo); both: each from the same SFT model, and the gate takes the better one."""

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that train a policy in this run, in the order in which their policies are evaluated."""
        return ("ppo", "dpo") if self.method == "both" else (self.method,)
