"""What a run needs to know of a model and its tokenizer, and the contradictions between them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from components.rlhf.config.model import LoraConfig
from components.rlhf.data.tokenizer import response_end_id, special_prefix, stop_ids_of
from components.rlhf.models.layers import layers_of
from components.rlhf.models.lora import add_adapters, merged_weights
from components.rlhf.models.nf4 import pack, share_in_4_bits
from components.rlhf.text.errors import InputError

POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # names in the configs of transformers


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts for the log, the manifest and `kfp-rlhf check-model`."""

    end_of_text: str  # the token that training appends to plain text
    end_of_turn: str  # the token that training appends to a response in a chat
    stop_tokens: tuple[str, ...]  # every token at which sampling stops
    stop_ids: tuple[int, ...]
    special_prefix: str  # of plain text, such as BOS
    max_positions: int  # the longest text; 0 if there is no limit

    def stops_sentence(self) -> str:
        turn = f", a chat's turn with {self.end_of_turn}" if self.end_of_turn != self.end_of_text else ""
        return f"training ends a text with {self.end_of_text}{turn}; sampling stops at {', '.join(self.stop_tokens)}"


def read_facts(model: Any, tokenizer: PreTrainedTokenizerBase, generation_eos: tuple[int, ...]) -> ModelFacts:
    def token(number: int) -> str:
        return str(tokenizer.convert_ids_to_tokens(number))

    stop_ids = stop_ids_of(tokenizer, generation_eos)
    return ModelFacts(
        end_of_text=token(response_end_id(tokenizer, is_chat=False)),
        end_of_turn=token(response_end_id(tokenizer, is_chat=True)),
        stop_tokens=tuple(token(i) for i in stop_ids),
        stop_ids=tuple(stop_ids),
        special_prefix="".join(token(i) for i in special_prefix(tokenizer)),
        max_positions=max_positions(model.config),
    )


def max_positions(config: Any) -> int:
    """The longest text that the model was made for, in tokens; 0 if its config has no limit (ALiBi, recurrent models)."""
    text = config.get_text_config()
    limits = [getattr(text, name, None) for name in POSITIONS]
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), 0)
    for rope in _ropes(text) if limit else []:
        if rope.get("original_max_position_embeddings") and rope.get("factor"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The RoPE parameters of a config: one set, or one for each kind of layer."""
    found = [
        rope for name in ("rope_parameters", "rope_scaling") if isinstance(rope := getattr(text, name, None), dict)
    ]
    return [*found, *(inner for rope in found for inner in rope.values() if isinstance(inner, dict))]


def require_matching_tokenizer(
    folder: Path | str, model: Any, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts
) -> None:
    """Raise InputError if the tokenizer has ids for which the model has no embedding, or sampling could never stop."""
    size = embedding_size(model)
    vocabulary = tokenizer.get_vocab()
    # A special token that no text uses, such as that of an image in a model without vision, needs no embedding.
    template = str(tokenizer.chat_template or "")
    beyond = sorted(
        (number, token)
        for token, number in vocabulary.items()
        if number >= size and (number not in tokenizer.all_special_ids or token in template or number in facts.stop_ids)
    )
    if beyond:
        raise InputError(
            f"{folder}: the tokenizer has {len(vocabulary):,} tokens, but the model embeds only the ids below {size:,} "
            f"({beyond[0][1]!r} is {beyond[0][0]:,}); resize the model's embeddings, or save the tokenizer that it was trained with."
        )
    unknown = [number for number in facts.stop_ids if number >= size]
    if unknown:
        raise InputError(
            f"{folder}: eos_token_id {unknown[0]:,} in generation_config.json or config.json is beyond the {size:,} ids that the "
            "model can generate; correct it."
        )


def require_context(folder: Path | str, config: Any, facts: ModelFacts, max_sequence_tokens: int | None) -> None:
    """Raise InputError if texts of the run do not fit into the context, or would change the positions of shorter ones."""
    for rope in _ropes(config.get_text_config()):
        kind, short = rope.get("rope_type"), rope.get("original_max_position_embeddings")
        short = short or getattr(config.get_text_config(), "original_max_position_embeddings", None)
        if kind == "dynamic":
            short = short or facts.max_positions
        if kind in ("longrope", "dynamic") and short and (max_sequence_tokens or 0) > short:
            raise InputError(
                f"{folder}: with {kind} RoPE the positions of all texts of a batch change when one is longer than {short:,} tokens, but "
                f"prompt and response may have {max_sequence_tokens:,}; lower data.max_tokens, data.max_prompt_tokens or max_new_tokens."
            )
    if max_sequence_tokens and facts.max_positions and max_sequence_tokens > facts.max_positions:
        raise InputError(
            f"{folder}: prompt and response may have {max_sequence_tokens:,} tokens together, but the model has only "
            f"{facts.max_positions:,} positions (max_position_embeddings); lower data.max_tokens, data.max_prompt_tokens or "
            "max_new_tokens."
        )


def require_chat_template(folder: Path | str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise InputError(
            f"{folder}: data.template is chat, but the tokenizer has no chat template; set data.template to plain, or add one."
        )


def require_lora_modules(model: Any, names: tuple[str, ...], *, num_frozen_layers: int) -> None:
    """Raise InputError unless adapters of these modules can be trained and merged, tried on the model without its weights."""
    if not names:
        return
    modules = [
        (name, module)
        for layer in layers_of(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    found = {name.rpartition(".")[2] for name, _ in modules}
    if unknown := sorted(set(names) - found):
        choices = (
            f"choose among {', '.join(sorted(found))}" if found else "it has no linear modules; set model.lora to null"
        )
        raise InputError(
            f"model.lora.target_modules names {', '.join(unknown)}, which no layer of {type(model).__name__} has; {choices}."
        )
    owners = Counter(id(module.weight) for name, module in modules if name.rpartition(".")[2] in names)
    try:
        if max(owners.values()) > 1:
            raise ValueError("layers share these weights")
        empty = _without_weights(model)
        expected = set(empty.state_dict())
        add_adapters(empty, LoraConfig(target_modules=names), num_frozen_layers=num_frozen_layers, seed=0)
        if {name for name, _ in merged_weights(empty, empty.state_dict().items())} != expected:
            raise ValueError("they cannot be merged into the weights of the model")
    except InputError:
        raise
    except Exception as error:  # peft raises many types for modules that it does not know
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise InputError(
            f"{type(model).__name__} cannot have LoRA adapters on {', '.join(names)} ({reason}); name other modules in "
            "model.lora.target_modules."
        ) from error


@torch.no_grad()
def require_adapters_that_count(model: Any, names: tuple[str, ...]) -> None:
    """Raise InputError if the model uses the weight of one of these modules without calling the module.

    An adapter would change nothing there while it is trained, but the merged weight would.
    """
    layers = layers_of(model)
    modules = [
        (name, module)
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    ]
    called: set[nn.Module] = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for _, module in modules]
    ids = torch.arange(10, 30)[None] % model.config.get_text_config().vocab_size
    before = model(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    for name, module in modules:
        if module in called:
            continue
        module.weight.mul_(2.0)  # exact, and undone exactly
        changed = not torch.equal(model(input_ids=ids, use_cache=False).logits, before)
        module.weight.mul_(0.5)
        if changed:
            raise InputError(
                f"{type(model).__name__} uses the weight of {name} without calling the layer, so that an adapter would have no effect; "
                f"remove {name.rpartition('.')[2]} from model.lora.target_modules."
            )


def require_quantizable(model: Any) -> str:
    """A sentence that says how much of the model is kept in 4 bits. Raises InputError if nothing can be, or bitsandbytes is missing."""
    share = share_in_4_bits(model)
    if share == 0:
        raise InputError(
            f"{type(model).__name__} has no linear layers that could be kept in 4 bits; set model.lora.quantization to null."
        )
    pack(torch.zeros(1, 64))
    rest = ", the rest, such as experts in one tensor, in the precision of the model" if share < 0.9 else ""
    return f"model.lora.quantization keeps {share:.0%} of the parameters of the layers in 4 bits{rest}"


def _without_weights(model: Any) -> Any:
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return from_config(model.config, trust_remote_code=False)


def embedding_size(model: Any) -> int:
    """The number of ids that the model both reads and, if it has a language model head, generates."""
    sizes = [model.get_input_embeddings().weight.shape[0]]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "weight", None) is not None:
        sizes.append(head.weight.shape[0])
    return int(min(sizes))
