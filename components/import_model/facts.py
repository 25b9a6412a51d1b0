"""What a run needs to know of a model and its tokenizer, and the contradictions between them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from components.rlhf.data.tokenizer import response_end_id, special_prefix, stop_ids_of
from components.rlhf.models.layers import layers_of
from components.rlhf.text.errors import InputError


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
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return 0
    for rope in (getattr(text, "rope_parameters", None), getattr(text, "rope_scaling", None)):
        if isinstance(rope, dict) and rope.get("original_max_position_embeddings") and rope.get("factor"):
            limit = max(limit, int(rope["original_max_position_embeddings"] * rope["factor"]))
    return limit


def require_matching_tokenizer(
    folder: Path | str, model: Any, tokenizer: PreTrainedTokenizerBase, facts: ModelFacts
) -> None:
    """Raise InputError if the tokenizer has ids for which the model has no embedding, or sampling could never stop."""
    size = embedding_size(model)
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in vocabulary.items() if number >= size)
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


def require_context(folder: Path | str, facts: ModelFacts, max_sequence_tokens: int | None) -> None:
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


def require_lora_modules(model: Any, names: tuple[str, ...]) -> None:
    """Raise InputError unless the layers have linear modules of all these names."""
    if not names:
        return
    found = {
        name.rpartition(".")[2]
        for layer in layers_of(model)
        for name, module in layer.named_modules()
        if type(module).__name__ == "Linear"
    }
    if unknown := sorted(set(names) - found):
        raise InputError(
            f"model.lora.target_modules names {', '.join(unknown)}, which no layer of {type(model).__name__} has; "
            f"choose among {', '.join(sorted(found))}."
        )


def embedding_size(model: Any) -> int:
    """The number of ids that the model both reads and, if it has a language model head, generates."""
    sizes = [model.get_input_embeddings().weight.shape[0]]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and getattr(head, "weight", None) is not None:
        sizes.append(head.weight.shape[0])
    return int(min(sizes))
