"""The shape of a model: how many parameters are where, and the widths that activations and caches depend on."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear module of a layer, which may receive an adapter."""

    layer: int
    name: str
    inputs: int
    outputs: int


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Numbers of parameters by place, and widths. exact says whether the parameters were counted or estimated from config.json."""

    name: str
    exact: bool
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int  # width of the feed-forward layers that a token goes through, of all its experts together
    gated: bool  # whether a feed-forward layer has a gate beside its first matrix
    vocab: int
    embeddings: int  # parameters of all embeddings, with that of a tied head
    head: int  # parameters of a head of its own; 0 if it is tied to the embeddings
    layers: tuple[int, ...]  # parameters of each layer
    rest: int  # the final norm, and what belongs to no other place
    largest: int  # parameters of the largest tensor
    linears: tuple[Linear, ...] = ()
    experts: int = 0  # parameters of all experts
    expert_share: float = 1.0  # of the experts that a token goes through
    stored_bytes: int = 0  # of the files; 0 if unknown

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def total(self) -> int:
        return self.embeddings + self.head + sum(self.layers) + self.rest

    @property
    def active(self) -> int:
        """Parameters that one token is multiplied with: without embeddings of their own, and with its own experts only."""
        idle = round(self.experts * (1 - self.expert_share))
        head = self.head or self.vocab * self.hidden
        return sum(self.layers) + self.rest - idle + head

    def parameters(self, *, scalar: bool = False) -> int:
        """All parameters of the language model, or of a reward model of this shape, which has one output in place of the head."""
        return self.total - self.head + self.hidden if scalar else self.total

    def frozen(self, num_frozen_layers: int) -> int:
        """Parameters of the lowest layers and the embeddings; 0 if no layer is frozen."""
        return self.embeddings + sum(self.layers[:num_frozen_layers]) if num_frozen_layers else 0

    def trained(self, num_frozen_layers: int, *, scalar: bool = False) -> int:
        return self.parameters(scalar=scalar) - self.frozen(num_frozen_layers)

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear modules of all layers, which QLoRA keeps in 4 bits."""
        return sum(linear.inputs * linear.outputs for linear in self.linears)

    def adapters(self, rank: int, modules: tuple[str, ...], num_frozen_layers: int) -> int:
        """Parameters of LoRA adapters of this rank on the named modules."""
        return sum(rank * (linear.inputs + linear.outputs) for linear in self._adapted(modules, num_frozen_layers))

    def adapter_outputs(self, modules: tuple[str, ...], num_frozen_layers: int) -> tuple[int, int]:
        """Summed over the layers: the outputs of the adapted modules, and how many there are."""
        found = self._adapted(modules, num_frozen_layers)
        return sum(linear.outputs for linear in found), len(found)

    def _adapted(self, modules: tuple[str, ...], num_frozen_layers: int) -> list[Linear]:
        return [linear for linear in self.linears if linear.name in modules and linear.layer >= num_frozen_layers]


def widths(config: Mapping[str, object]) -> Mapping[str, object]:
    """The section of config.json that describes the language model, which multimodal models nest."""
    for name in ("text_config", "llm_config", "language_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping):
            return {**config, **inner}
    return config
