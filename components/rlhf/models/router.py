"""The auxiliary loss that balances the experts of a mixture-of-experts model (Fedus et al. 2021, Switch Transformers, eq. 4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.rlhf.models.layers import Output, run_head

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")  # names in the configs of transformers


@dataclass(frozen=True, kw_only=True)
class RouterLoss:
    """coefficient x the auxiliary loss of the model's own class, as transformers adds it to a loss of its own.

    It is computed by the class's forward pass on a model without weights (on the device `meta`), because that pass needs only the
    logits of the routers.
    """

    coefficient: float
    model: Any

    options: ClassVar[Mapping[str, Any]] = {"output_router_logits": True}  # of the decoder's forward pass

    @classmethod
    def of(cls, config: Any) -> "RouterLoss | None":
        """The loss of models with this config; None if transformers has none for them or its coefficient is 0."""
        coefficient = _coefficient(config)
        if not coefficient:
            return None
        from_config: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = from_config(config, trust_remote_code=False).eval()
        return cls(coefficient=coefficient, model=model)

    def __call__(self, output: Any, attention_mask: Tensor) -> Tensor | None:
        """The loss (scalar) of one pass of the decoder with `options`, over the real tokens of attention_mask [B, S] bool."""
        logits = getattr(output, "router_logits", None)
        if not logits:
            return None
        if logits[0].shape[:-1].numel() < attention_mask.numel():  # packed: of real tokens only
            attention_mask = attention_mask[attention_mask][None]
        hidden = torch.zeros(1, 1, output.last_hidden_state.shape[-1], device="meta")
        found = run_head(
            self.model,
            Output(last_hidden_state=hidden, router_logits=tuple(logits)),
            output_router_logits=True,
            attention_mask=attention_mask,
        )
        loss = getattr(found, "aux_loss", None)
        return self.coefficient * loss if isinstance(loss, Tensor) else None


def _coefficient(config: Any) -> float:
    text = config.get_text_config()
    for part in (text, *(value for value in vars(text).values() if hasattr(value, "model_type"))):
        for name in COEFFICIENTS:
            value = getattr(part, name, None)
            if isinstance(value, int | float):
                return float(value)
    return 0.0
