"""A tiny random model of every causal language model type that transformers knows, built from its config class alone.

The config of a type is derived from the fields of its config class: what a field is called says what it means, so one
table of names serves all types. What cannot be derived so is in OVERRIDES, by type. The sizes are chosen so that the
things that make architectures differ (sliding windows, softcapping, scales, routing, recurrences) show in the logits
of a text of 20 tokens.
"""

import dataclasses
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 256
HIDDEN_SIZE = 64
NUM_LAYERS = 4
NUM_HEADS = 4
HEAD_DIM = HIDDEN_SIZE // NUM_HEADS
WIDE_HEAD_DIM = 2 * HEAD_DIM  # for the types whose heads are not hidden size / heads wide
WINDOW = 8
MAX_POSITIONS = 256
MAX_PARAMETERS = 5_000_000  # more than this means that a field kept its full size
LOGITS_STD = 1.5


class CannotBuild(Exception):
    """The type has no tiny model; the message says why."""


# --- what a field is called, and its value ------------------------------------------------------------------------

# Each entry is a regular expression for the whole name, and the value. The first match counts. Names that match
# nothing keep the default of the config class.
SIZES: list[tuple[str, Any]] = [
    (r"bos_token_id", 1),
    (r"eos_token_id|forced_eos_token_id|decoder_start_token_id", 2),
    (r"pad_token_id", 0),
    (r"(sep|cls|mask|eod|unk)_token_id", 3),
    (r"vocab_size|decoder_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size", VOCAB_SIZE),
    (r"pronunciation_vocab_size|shape_vocab_size|audio_vocab_size|codebook_size", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions|model_max_length", 256),
    (r"context_length|rel_extent|max_inference_chunksize", MAX_POSITIONS),
    # widths
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_dim|backbone_hidden_size|lru_width|hidden_size_global",
        HIDDEN_SIZE,
    ),
    (r"(moe_)?(shared_)?(experts?_)?(moe_)?(dense_)?intermediate_size(_mlp)?|prefix_dense_intermediate_size", 96),
    (r"(encoder_|decoder_)?ffn_dim|(expert_)?ffn_hidden_size|d_ff|dff|dim_ff|d_inner|n_inner|feed_forward_size", 96),
    (r"mlp_dim|moe_shared_expert_intermediate_size|shared_experts?_intermediate_size|block_ff_dim", 96),
    (r"hidden_size_per_layer_input|ple_embed_dim|pronunciation_embed_dim|shape_embed_dim|adapter_rank", 16),
    (r"moe_latent_size|router_hidden_size|laurel_rank|hc_lowrank|gated_norm_rank|d_rel|prompt_mid_dim", 16),
    (r"input_embedding_size|output_embedding_size", 32),
    # depth
    (r"(num_)?(encoder_|decoder_|hidden_)?layers|n_layers?|num_blocks|depth", NUM_LAYERS),
    # heads
    (r"(num_)?(encoder_|decoder_)?attention_heads|n_heads?|num_heads|linear_num_(value_)?heads", NUM_HEADS),
    (r"swa_num_attention_heads|num_attention_heads_per_layer", NUM_HEADS),
    (r"linear_num_key_heads|swa_num_key_value_heads|num_global_key_value_heads", 2),
    (r"attention_head_size|dim_head|d_head|d_kv|attention_head_dim|kv_channels|swa_(v_)?head_dim", HEAD_DIM),
    (r"linear_(key_|value_)?head_dim|index(er)?_head_dim", HEAD_DIM),
    (r"index(er)?_n_heads", 2),
    (r"rotary_dim", HEAD_DIM // 2),
    # latent attention
    (r"q_lora_rank", 24),
    (r"kv_lora_rank|o_lora_rank", 16),
    (r"qk_nope_head_dim|v_head_dim", HEAD_DIM),
    (r"qk_rope_head_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM + HEAD_DIM // 2),
    # windows and chunks
    (r"sliding_window(_size)?|local_attention|attention_window_size|attention_chunk_size|window_size", WINDOW),
    (r"local_attention_window_len|index_topk|keep_window_size", WINDOW),
    (r"(mamba_)?chunk_size|block_size", WINDOW),
    (r"index_block_size", 4),
    (r"index_topk_blocks", 2),
    (r"sliding_window_pattern|_sliding_window_pattern|global_attn_every_n_layers|layer_group_size", 2),
    (r"use_sliding_window", True),
    (r"max_window_layers", NUM_LAYERS // 2),
    (r"no_rope_layer_interval", 2),
    # experts
    (r"(moe_)?num_(local_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts", 2),
    (r"zero_expert_num", 2),
    (r"router_aux_loss_coef|aux_loss_coef|moe_loss_weight", 0.01),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"interleave_moe_layer_step|decoder_sparse_step|expert_layer_period", 2),
    (r"mlp_only_layers", [0]),
    (r"moe_layer_end_index", NUM_LAYERS - 1),
    (r"(attn|expert)_layer_offset", 1),
    (r"attn_layer_period", 2),
    # recurrences: the inner width is twice the hidden size, in eight heads
    (r"state_size|ssm_state_size|mamba_d_state", 8),
    (r"mamba_n_heads|mamba_num_heads", 8),
    (r"mamba_d_head|mamba_head_?dim", 2 * HIDDEN_SIZE // 8),
    (r"mamba_d_ssm", 2 * HIDDEN_SIZE),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"n_groups|mamba_ngroups|mamba_n_groups", 2),
    # scales that would hide a mistake if they were neutral
    (r"logits_scaling|logits_mup_width_multiplier", 4.0),
    (r"logit_scale", 0.25),
    (r"final_logit_softcapping|logits_soft_cap|output_logit_soft_cap", 3.0),
    (r"attn_logit_softcapping", 5.0),
    (r"query_pre_attn_scalar", 8),
    (r"embedding_multiplier|embedding_scale|scale_emb", 3.0),
    (r"residual_multiplier|lm_head_multiplier|key_multiplier", 0.5),
    (r"(attention|ssm)_(in|out)_multiplier", 0.75),
    (r"attention_multiplier", 0.2),
    (r"routed_scaling_factor|route_scale|moe_routed_scaling_factor|router_scaling_factor", 1.5),
    (r"dim_model_base", HIDDEN_SIZE // 2),
    (r"mup_enabled|scale_embedding", True),
    # randomness in training
    (r".*(dropout|pdrop|layerdrop|dropout_prob|dropout_p|dropout_rate|first_dropout|last_dropout)", 0.0),
    # towers for other inputs, which a text does not use
    (r"image_size|crop_size", 32),
    (r"patch_size", 16),
]

# What no name says, by type.
# A dictionary for a nested config is what to override in it.
SLIDING_FULL = ["sliding_attention", "full_attention"] * 2
GEMMA4 = {"global_head_dim": WIDE_HEAD_DIM, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0}
GEMMA4_ASSISTANT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 4}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 64, "patch_size": 4},
    "blt_local_decoder": {"num_hidden_layers": 2},
    "blt_local_encoder": {"num_hidden_layers": 1},
    "blt_patcher": {"num_hidden_layers": 2},
    "cohere_compass_text": {
        "layer_types": SLIDING_FULL,
        "rope_parameters": {  # no RoPE in the layers with full attention
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "full_attention": None,
        },
    },
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 3.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots3_note_audio_encoder": {"adapter_out_dim": HIDDEN_SIZE, "adapter_input_size": HIDDEN_SIZE},
    "dots3_note_text": {
        "swa_num_attention_heads": NUM_HEADS,
        "swa_num_key_value_heads": NUM_HEADS,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 24,
        "swa_v_head_dim": HEAD_DIM,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": HIDDEN_SIZE, "adapter_out_dim": HIDDEN_SIZE},
    "gemma3_text": {"attn_logit_softcapping": None},  # only its eager attention knows it
    "gemma3n_text": {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0]},
    "gemma4_assistant": {"text_config": GEMMA4_ASSISTANT},
    "gemma4_text": GEMMA4,
    "gemma4_unified_assistant": {"text_config": GEMMA4_ASSISTANT},
    "gemma4_unified_text": {"global_head_dim": WIDE_HEAD_DIM},
    "gpt_neo": {"attention_types": [[["global", "local"], NUM_LAYERS // 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": 2, "num_layers_per_stack": None},  # they are repeated
    "inkling_text": {"log_scaling_n_floor": WINDOW, "rel_extent": 2 * WINDOW},
    "inkling2_text": {"log_scaling_n_floor": WINDOW, "rel_extent": 2 * WINDOW, "n_layers_per_attn_res_block": 2},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"moe_layers": [1, 3], "floor_scale": 4},
    "mamba2": {"num_heads": 8, "head_dim": 2 * HIDDEN_SIZE // 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "phi4_multimodal_audio": {
        "ext_pw_out_channel": 64,
        "depthwise_separable_out_channel": 64,
        "nemo_conv_channels": 64,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_head_dim": WIDE_HEAD_DIM,
        "indexer_kv_heads": 1,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [1],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 4,
        "split_ngram_parts": 2,
    },
    "reformer": {
        "is_decoder": True,  # its class is built for nothing else
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [HIDDEN_SIZE // 4, HIDDEN_SIZE * 3 // 4],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its query and value widths are multiples of 64
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"] * 2},
}


def causal_lm_types() -> list[str]:
    """Every model type that AutoModelForCausalLM can build, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PretrainedConfig:
    """The config of a tiny model of this type."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise CannotBuild(f"{model_type} is not a type of causal language model")
    with _quiet():
        try:
            return _shrink(CONFIG_MAPPING[model_type])
        except ImportError as error:
            raise CannotBuild(_reason(error)) from error


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model of this type in fp32 and eval mode, whose weights depend on the seed alone."""
    config = tiny_config(model_type)
    with _quiet(), torch.random.fork_rng(devices=[]):
        _check_size(config)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        spread_weights(model)
        try:
            spread_logits(model)
        except (TypeError, ValueError) as error:
            raise CannotBuild(f"does not take input_ids and attention_mask alone: {_reason(error)}") from error
    return model


def _check_size(config: PretrainedConfig) -> None:
    """Construct the model without memory, and refuse it if it is not tiny or its class does not take the config."""
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    except (ImportError, ValueError) as error:
        raise CannotBuild(_reason(error)) from error
    except AttributeError as error:
        wanted = AutoModelForCausalLM._model_mapping[type(config)].config_class
        if wanted is type(config):
            raise
        raise CannotBuild(
            f"its class takes a {wanted.__name__}, not the {type(config).__name__} of its type"
        ) from error
    if size > MAX_PARAMETERS:
        raise CannotBuild(f"{size:,} parameters: a field of its config kept its full size")


# --- the config ---------------------------------------------------------------------------------------------------


def _shrink(config_class: type[PretrainedConfig], **given: Any) -> PretrainedConfig:
    """A tiny config of this class, whose own sub-configs are tiny as well. Given values win over derived ones."""
    overrides = OVERRIDES.get(config_class.model_type, {}) | given
    fields = {field.name for field in dataclasses.fields(config_class)}
    nested = {name: _shrink(sub, **overrides.get(name, {})) for name, sub in _sub_configs(config_class).items()}
    default = config_class(**nested)
    values = {name: size for name in fields if (size := _size_of(name)) is not None}
    values |= _head_sizes(default, fields)
    values |= _groups(default, fields)
    values |= _rope(default, values)
    values |= _layer_lists(default, fields)
    config = config_class(**values | overrides | nested)
    if "vocab_size" in fields:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # not every class has a field for them
            setattr(config, name, _size_of(name))
    return config


def _sub_configs(config_class: type[PretrainedConfig]) -> dict[str, type[PretrainedConfig]]:
    """The config classes nested in this one by the name of their field, without the optional ones."""
    found = {}
    for name, spec in (config_class.sub_configs_defaults or config_class.sub_configs).items():
        if isinstance(spec, type):
            found[name] = spec
        elif not spec.optional:
            is_auto = not issubclass(spec.config_class, PretrainedConfig)
            found[name] = CONFIG_MAPPING[spec.model_type] if is_auto else spec.config_class
    return found


def _size_of(name: str) -> Any:
    """The tiny value of a field that is called so, or None."""
    return next((value for pattern, value in SIZES if re.fullmatch(pattern, name)), None)


def _get(config: PretrainedConfig, name: str) -> Any:
    """The value of a field; None if there is none, or if it differs between the layers."""
    try:
        return getattr(config, name, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return None


def _head_sizes(default: PretrainedConfig, fields: set[str]) -> dict[str, Any]:
    """Head widths and key/value heads in the relation to the other sizes that they have in the default config."""
    values: dict[str, Any] = {}
    latent = {"kv_lora_rank", "qk_rope_head_dim"} <= fields
    for name in {"num_key_value_heads", "num_kv_heads"} & fields:
        shared_by_all = _get(default, name) == 1
        values[name] = 1 if shared_by_all else NUM_HEADS if latent else NUM_HEADS // 2
    if "head_dim" in fields:
        value, heads = _get(default, "head_dim"), _get(default, "num_attention_heads")
        others = {_get(default, name): _size_of(name) for name in ("qk_rope_head_dim", "qk_head_dim", "v_head_dim")}
        if latent and value in others:
            values["head_dim"] = others[value]
        elif value is None or (heads and value * heads == default.hidden_size):
            values["head_dim"] = HEAD_DIM
        else:
            values["head_dim"] = WIDE_HEAD_DIM
    for name in {"embedding_size", "word_embed_proj_dim"} & fields:
        values[name] = HIDDEN_SIZE if _get(default, name) == default.hidden_size else HIDDEN_SIZE // 2
    return values


def _groups(default: PretrainedConfig, fields: set[str]) -> dict[str, Any]:
    """Routing in two groups where the default config routes in groups; as many shared experts, but two at most."""
    values: dict[str, Any] = {}
    for name in {"n_group", "num_expert_group"} & fields:
        if (_get(default, name) or 1) > 1:
            values |= {name: 2, "topk_group": 1}
    for name in {"num_shared_experts", "n_shared_experts", "moe_num_shared_experts"} & fields:
        values[name] = 1 if _get(default, name) is None else min(_get(default, name), 2)
    return values


def _rope(default: PretrainedConfig, values: dict[str, Any]) -> dict[str, Any]:
    """The RoPE parameters of the default config, with its lengths and sections brought to the tiny size."""
    found = _get(default, "rope_parameters")
    if not found:
        return {}
    width = values.get("head_dim") or HEAD_DIM
    shrunk = _shrink_rope(found, width)
    return {"rope_parameters": shrunk} if shrunk != found else {}


def _shrink_rope(parameters: dict[str, Any], width: int) -> dict[str, Any]:
    shrunk = dict(parameters)
    for name, value in parameters.items():
        if isinstance(value, dict):
            shrunk[name] = _shrink_rope(value, width)
        elif name == "original_max_position_embeddings" and value:
            shrunk[name] = MAX_POSITIONS // 4
        elif name == "mrope_section" and value:
            half = int(width * (parameters.get("partial_rotary_factor") or 1.0)) // 2
            first = half - 2 * (half // 3)
            shrunk[name] = [first, half // 3, half // 3]
    return shrunk


def _layer_lists(default: PretrainedConfig, fields: set[str]) -> dict[str, Any]:
    """The fields with one entry per layer, for the tiny number of layers, with every kind that the default has."""
    depth = _get(default, "num_hidden_layers")
    values: dict[str, Any] = {}
    for name in fields:
        entries = _get(default, name)
        if isinstance(entries, list | tuple) and depth and len(entries) == depth and not name.endswith("_idxs"):
            size = _size_of(name)
            values[name] = [size] * NUM_LAYERS if size is not None else shorten(entries, NUM_LAYERS)
    has_window = {"sliding_window", "sliding_window_size"} & fields
    if has_window and set(values.get("layer_types", ())) in ({"full_attention"}, {"sliding_attention"}):
        values["layer_types"] = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
    return values


def shorten(entries: Sequence[Any], length: int) -> list[Any]:
    """A list of this length with every kind of entry: prefixes stay prefixes, and what alternates still does."""
    entries = list(entries)
    kinds = list(dict.fromkeys(entries))
    if len(kinds) == 2 and entries == sorted(entries, key=kinds.index):
        return [kinds[0]] + [kinds[1]] * (length - 1)
    return [kinds[i % len(kinds)] for i in range(length)]


# --- the weights --------------------------------------------------------------------------------------------------

# Parameters of recurrences, which are stable only in the range that the model class draws them from.
OWN_INIT = re.compile(
    r"(^|\.)(A_log|A|D|dt_bias|dt_proj\.bias|dt_proj_bias|time_decay|time_first|recurrent_param|b_dt|fgate.*|igate.*)$"
)


def spread_weights(model: PreTrainedModel) -> None:
    """Draw weights large enough that every part of the model matters for its logits.

    Vectors keep their own value (ones for most norms, zeros for most biases) and get noise.
    """
    tables = {id(m.weight): m.padding_idx for m in model.modules() if isinstance(m, nn.Embedding)}
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if OWN_INIT.search(name):
                continue
            if parameter.squeeze().ndim < 2:
                parameter.nan_to_num_().add_(torch.randn_like(parameter), alpha=0.1)
            elif id(parameter) in tables:
                parameter.normal_(std=0.5)
                if (padding := tables[id(parameter)]) is not None:
                    parameter[padding] = 0.0  # as every embedding has it, and as loading it may set it again
            elif id(parameter) in convolutions:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(std=1.2 * (parameter.shape[-1] * parameter.shape[-2]) ** -0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("bias") and buffer.is_floating_point() and not buffer.any():
                buffer.add_(torch.randn_like(buffer), alpha=0.05)  # what corrects the choice of experts
            elif name.endswith("tid2eid"):
                experts = torch.rand(buffer.shape[0], 4).argsort(dim=-1)
                buffer.copy_(experts[:, : buffer.shape[1]])  # the experts of each token


def spread_logits(model: PreTrainedModel) -> None:
    """Scale the output embeddings so that the logits of a position have a spread of about LOGITS_STD."""
    head = model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is None:
        return
    for _ in range(3):
        spread = logits_of(model, example_ids(seed=1)).std(dim=-1).mean()
        if not torch.isfinite(spread) or spread == 0:
            return
        with torch.no_grad():
            head.weight.mul_((LOGITS_STD / spread).clamp(0.05, 20.0))


def example_ids(seed: int = 0, rows: int = 2, length: int = 20) -> torch.Tensor:
    """Random ids of text tokens (no special ones)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCAB_SIZE, (rows, length), generator=generator)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a plain forward of whole texts."""
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings about configs: the default ones break their own rules."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
