"""The shape of a model from its config.json alone: exact for the Llama family, an estimate for other architectures.

Names of the entries differ between architectures; what an entry does not say has the usual relation to the others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components.rlhf.planner.shape import Linear, ModelShape, widths
from components.rlhf.text.errors import InputError

HIDDEN = ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
INTERMEDIATE = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "feed_forward_size")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_k", "top_k")
EXPERT_SIZE = ("moe_intermediate_size", "expert_ffn_hidden_size")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
# Architectures with two matrices in a feed-forward layer, without a gate.
TWO_MATRICES = (
    "gpt2", "gptj", "gpt_neo", "gpt_neox", "gpt_neox_japanese", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "phi", "codegen",
    "starcoder2", "xglm", "nemotron", "biogpt", "persimmon", "openai-gpt", "ctrl", "fuyu", "arcee", "apertus",
)  # fmt: skip
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "opt", "openai-gpt", "biogpt", "ctrl")
WITH_BIASES = (
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_bigcode",
    "opt",
    "bloom",
    "phi",
    "codegen",
    "xglm",
    "biogpt",
    "openai-gpt",
    "ctrl",
)
QKV_BIASES = ("qwen2", "qwen2_moe")
HEAD_NORMS = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3")
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3")
LIMIT = 10**9  # of each width: larger numbers are mistakes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What config.json says of the widths."""

    model_type: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate: int  # of a dense layer
    vocab: int
    tied: bool
    gated: bool
    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_experts: int

    @property
    def expert_share(self) -> float:
        return self.experts_per_token / self.num_experts if self.num_experts else 1.0

    @property
    def active_intermediate(self) -> int:
        used = self.experts_per_token + self.shared_experts
        return used * self.expert_size if self.num_experts else self.intermediate

    def widths(self) -> dict[str, Any]:
        """The fields of ModelShape that tensors do not show."""
        return {
            "hidden": self.hidden,
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate": self.active_intermediate,
            "gated": self.gated,
            "vocab": self.vocab,
        }


def read_sizes(config: Mapping[str, Any], name: str) -> Sizes:
    """The sizes in config.json. Raises InputError if an entry that is needed is missing or absurd."""
    text = widths(config)
    kind = str(text.get("model_type", ""))
    hidden = _number(text, HIDDEN, name)
    heads = _number(text, HEADS, name, default=max(hidden // 64, 1))
    intermediate = _number(text, INTERMEDIATE, name, default=4 * hidden)
    experts = _number(text, EXPERTS, name, default=0)
    multi_query = (
        kind in ("falcon", "gpt_bigcode") and text.get("multi_query", True) and not text.get("new_decoder_architecture")
    )
    return Sizes(
        model_type=kind,
        hidden=hidden,
        num_layers=_number(text, LAYERS, name),
        num_heads=heads,
        num_kv_heads=1 if multi_query else _number(text, KV_HEADS, name, default=heads),
        head_dim=_number(text, ("head_dim", "attention_head_dim"), name, default=max(hidden // heads, 1)),
        intermediate=intermediate,
        vocab=_number(text, ("vocab_size",), name),
        tied=bool(
            text.get(
                "tie_word_embeddings",
                config.get(
                    "tie_word_embeddings", kind in (*LEARNED_POSITIONS, "gemma", "gemma2", "gemma3_text", "cohere")
                ),
            )
        ),
        gated=kind not in TWO_MATRICES,
        num_experts=experts,
        experts_per_token=min(_number(text, EXPERTS_PER_TOKEN, name, default=2), experts) if experts else 0,
        expert_size=_number(text, EXPERT_SIZE, name, default=intermediate),
        shared_experts=_number(text, SHARED_EXPERTS, name, default=0),
    )


def _number(text: Mapping[str, Any], names: tuple[str, ...], name: str, default: int | None = None) -> int:
    found = next((text[key] for key in names if text.get(key) is not None), default)
    if isinstance(found, list):  # one entry per layer
        found = max((n for n in found if type(n) is int), default=None)
    if type(found) is float and found.is_integer():
        found = int(found)
    if type(found) is not int or not (0 if default == 0 else 1) <= found <= LIMIT:
        said = "is missing" if found is None else f"is {str(found)[:40]}"
        raise InputError(f"{name}: {names[0]} {said} in config.json, so that the model's size is unknown; correct it.")
    return found


def estimate(sizes: Sizes, config: Mapping[str, Any], name: str) -> ModelShape:
    """The shape of a decoder of the usual form: attention and a feed-forward layer, or experts, with norms."""
    text = widths(config)
    attention, attention_linears = _attention(sizes, text)
    matrices = 3 if sizes.gated else 2
    biases = sizes.model_type in WITH_BIASES or bool(text.get("mlp_bias"))
    dense = matrices * sizes.hidden * sizes.intermediate
    dense += ((matrices - 1) * sizes.intermediate + sizes.hidden) if biases else 0
    experts = matrices * sizes.hidden * sizes.expert_size * sizes.num_experts
    shared = matrices * sizes.hidden * sizes.expert_size * sizes.shared_experts
    routed = experts + shared + sizes.hidden * sizes.num_experts
    num_dense = _dense_layers(sizes, text)
    norm = 2 * sizes.hidden if sizes.model_type in WITH_BIASES else sizes.hidden
    norms = (4 if sizes.model_type in FOUR_NORMS else 2) * norm
    layers = tuple(attention + norms + (dense if number < num_dense else routed) for number in range(sizes.num_layers))
    positions = _number(text, POSITIONS, name, default=1) if sizes.model_type in LEARNED_POSITIONS else 0
    names = ("gate_proj", "up_proj", "down_proj") if sizes.gated else ("fc1", "fc2")
    feed_forward = [
        (n, *((sizes.intermediate, sizes.hidden) if n in ("down_proj", "fc2") else (sizes.hidden, sizes.intermediate)))
        for n in names
    ]
    linears = [
        Linear(layer=number, name=module, inputs=inputs, outputs=outputs)
        for number in range(sizes.num_layers)
        for module, inputs, outputs in [*attention_linears, *(feed_forward if number < num_dense else [])]
    ]
    return ModelShape(
        name=name,
        exact=False,
        **sizes.widths(),
        embeddings=(sizes.vocab + positions) * sizes.hidden,
        head=0 if sizes.tied else sizes.vocab * sizes.hidden,
        layers=layers,
        rest=norm,
        largest=max(sizes.vocab * sizes.hidden, sizes.hidden * sizes.intermediate, experts // matrices),
        linears=tuple(linears),
        experts=experts * (sizes.num_layers - num_dense),
        expert_share=sizes.expert_share,
    )


def _dense_layers(sizes: Sizes, text: Mapping[str, Any]) -> int:
    """The number of layers without experts."""
    if not sizes.num_experts:
        return sizes.num_layers
    first = text.get("first_k_dense_replace") or text.get("num_dense_layers") or 0
    return min(first if type(first) is int else 0, sizes.num_layers)


def _attention(sizes: Sizes, text: Mapping[str, Any]) -> tuple[int, list[tuple[str, int, int]]]:
    """Parameters of attention in a layer, and its linear modules as (name, inputs, outputs)."""
    hidden, queries, keys = sizes.hidden, sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    if type(text.get("kv_lora_rank")) is int:
        return _latent_attention(sizes, text)
    linears = [
        ("q_proj", hidden, queries),
        ("k_proj", hidden, keys),
        ("v_proj", hidden, keys),
        ("o_proj", queries, hidden),
    ]
    total = sum(inputs * outputs for _, inputs, outputs in linears)
    if text.get("attention_bias") or sizes.model_type in WITH_BIASES:
        total += queries + 2 * keys + hidden
    elif sizes.model_type in QKV_BIASES:
        total += queries + 2 * keys
    if sizes.model_type in HEAD_NORMS:
        total += queries + keys if sizes.model_type.startswith("olmo") else 2 * sizes.head_dim
    return total, linears


def _latent_attention(sizes: Sizes, text: Mapping[str, Any]) -> tuple[int, list[tuple[str, int, int]]]:
    """Attention whose keys and values are compressed, as in DeepSeek."""
    heads, hidden, latent = sizes.num_heads, sizes.hidden, int(text["kv_lora_rank"])
    nope, rope = int(text.get("qk_nope_head_dim") or 128), int(text.get("qk_rope_head_dim") or 64)
    value, q_rank = int(text.get("v_head_dim") or 128), text.get("q_lora_rank")
    linears = [
        ("kv_a_proj_with_mqa", hidden, latent + rope),
        ("kv_b_proj", latent, heads * (nope + value)),
        ("o_proj", heads * value, hidden),
    ]
    if q_rank:
        linears += [("q_a_proj", hidden, int(q_rank)), ("q_b_proj", int(q_rank), heads * (nope + rope))]
    else:
        linears.append(("q_proj", hidden, heads * (nope + rope)))
    norms = latent + (int(q_rank) if q_rank else 0)
    return sum(inputs * outputs for _, inputs, outputs in linears) + norms, linears
