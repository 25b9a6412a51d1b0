"""What a stage may spend."""

import json

from components.rlhf.config.base import BaseConfig, NonNegative, Positive


class BudgetConfig(BaseConfig):
    """The budget of the run, and what the stage costs. It changes no result: digests and keys of checkpoints leave it out."""

    limit: Positive | None = None
    """cluster.budget: most that the training stages of the run may cost together; null is unlimited."""
    price_per_hour: NonNegative = 0.0
    """Price of one pod of the stage per hour."""


def without_budget(settings: str) -> str:
    """The JSON text of a stage's settings without the budget; any other text as it is."""
    try:
        content = json.loads(settings)
    except ValueError:
        return settings
    if not isinstance(content, dict) or "budget" not in content:
        return settings
    del content["budget"]
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
