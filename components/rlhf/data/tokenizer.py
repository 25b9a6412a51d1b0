"""The tokenizer: loading, digests, and encoding of prompts and completions as separate sequences of ids."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.rlhf.data.chat import turn_end_id
from components.rlhf.data.records import Demonstration, LabeledText, PreferencePair, Prompt, RatedText, Turn, is_chat
from components.rlhf.text.errors import InputError

Record = Demonstration | PreferencePair | Prompt | RatedText | LabeledText


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder. PAD defaults to EOS; masks never depend on it. Raises InputError."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise InputError(f"{directory} has no tokenizer (no tokenizer.json); save the model's tokenizer into it.")
    try:
        loaded = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer = cast(PreTrainedTokenizerBase, loaded)
    except BaseException as error:  # a broken tokenizer.json raises any type; a Rust panic is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:500]
        raise InputError(f"{directory}: the tokenizer cannot be loaded ({reason}); save it again.") from error
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{directory}: the tokenizer has no end-of-sequence token; set eos_token in tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of everything that determines the ids of a text and its end: vocabulary, rules, special tokens and EOS.

    PAD does not matter, because masks come from lengths.
    """
    rules = _rules(tokenizer)
    content = json.dumps([rules, tokenizer.eos_token_id], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(content.encode()).hexdigest()


def same_ids(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether every text has the same ids in both, apart from the special tokens around it."""
    rules = [_rules(tokenizer) for tokenizer in (first, second)]
    for each in rules:
        each.pop("post_processor", None)
    return rules[0] == rules[1]


def _rules(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts of a tokenizer that determine ids, as JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"vocabulary": sorted(tokenizer.get_vocab().items())}
    rules = cast(dict[str, Any], json.loads(backend.to_str()))
    for name in ("padding", "truncation"):
        rules.pop(name, None)
    rules["added_tokens"] = sorted((token["id"], token["content"]) for token in rules.get("added_tokens", []))
    return rules


def encoding_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 of every rule that makes ids of a text, to the flags of each added token; None if the rules cannot be read.

    tokenizer_digest leaves out those flags, which differ between copies of one tokenizer that mean the same text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    _ids(tokenizer, "")  # without truncation and padding, which the rules contain as the last call has set them
    ends = [response_end_id(tokenizer, is_chat=is_chat) for is_chat in (False, True)]
    content = [backend.to_str(), tokenizer.split_special_tokens, special_prefix(tokenizer), ends]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.sha256(str(tokenizer.chat_template or "").encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """One prompt with what follows it. A complete text ends with response_end_id; a truncated one does not."""

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[bool]  # of response_ids: True for a token to learn, False between the answers of a conversation
    truncated: bool

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_learned(self) -> int:
        return sum(self.response_mask)

    def cut(self, max_tokens: int) -> "EncodedText":
        """The text within max_tokens. A prompt is never cut."""
        limit = max(max_tokens - len(self.prompt_ids), 0)
        if len(self.response_ids) <= limit:
            return self
        ids, mask = self.response_ids[:limit], self.response_mask[:limit]
        return EncodedText(prompt_ids=self.prompt_ids, response_ids=ids, response_mask=mask, truncated=True)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, *, is_chat: bool = False) -> list[int]:
    """Ids of a prompt.

    Plain text gets the special tokens that tokenizer(text) puts before it, such as BOS, unless it already begins with them. A
    rendered chat gets none, because its template has written them.
    """
    ids = _ids(tokenizer, prompt)
    prefix = [] if is_chat else special_prefix(tokenizer)
    return ids if ids[: len(prefix)] == prefix else [*prefix, *ids]


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a completion, without special tokens."""
    return _ids(tokenizer, text)


def encode_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, *, max_tokens: int, is_chat: bool = False
) -> EncodedText:
    """Ids of a prompt and its completion, tokenized separately, as a model that continues the prompt would generate them.

    A complete text ends with response_end_id. Texts of more than max_tokens (end included) are truncated and have no end.
    """
    return encode_turns(tokenizer, [Turn(context=prompt, answer=completion)], max_tokens=max_tokens, is_chat=is_chat)


def encode_turns(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, max_tokens: int, is_chat: bool = False
) -> EncodedText:
    """Ids of the answers of one text, each with its end, and of what stands between them.

    Answers are tokenized separately, as a model that continues the text before them would generate them.
    """
    prompt_ids = encode_prompt(tokenizer, turns[0].context, is_chat=is_chat)
    end = response_end_id(tokenizer, is_chat=is_chat)
    ids: list[int] = []
    mask: list[bool] = []
    for number, turn in enumerate(turns):
        between = [] if number == 0 else _ids_after(tokenizer, end, turn.context)
        answer = [*encode_completion(tokenizer, turn.answer), end]
        ids += [*between, *answer]
        mask += [False] * len(between) + [True] * len(answer)
    whole = EncodedText(prompt_ids=prompt_ids, response_ids=ids, response_mask=mask, truncated=False)
    return whole.cut(max_tokens)


def encode_record(record: Record, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> list[EncodedText]:
    """The texts of a record as ids, exactly as training encodes them; none for a prompt."""
    match record:
        case PreferencePair():
            return [
                encode_text(tokenizer, record.prompt, text, max_tokens=max_tokens, is_chat=is_chat(record))
                for text in (record.chosen, record.rejected)
            ]
        case RatedText() | LabeledText():
            return [
                encode_text(tokenizer, record.prompt, record.completion, max_tokens=max_tokens, is_chat=is_chat(record))
            ]
        case Demonstration():
            return [encode_turns(tokenizer, record.turns, max_tokens=max_tokens, is_chat=is_chat(record))]
        case _:
            return []


def _ids_after(tokenizer: PreTrainedTokenizerBase, token: int, text: str) -> list[int]:
    """Ids of a text that follows a special token: some tokenizers put a space before a text that stands alone."""
    ids = _ids(tokenizer, str(tokenizer.convert_ids_to_tokens(token)) + text)
    return ids[1:] if ids[:1] == [token] else _ids(tokenizer, text)


def decode_response(tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], response_ids: list[int]) -> str:
    """The text that a response adds to its prompt, without special tokens.

    Decoded with the prompt, because alone some tokenizers (SentencePiece) drop the space that it begins with.
    """
    before, whole = (
        str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (prompt_ids, [*prompt_ids, *response_ids])
    )
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(response_ids, skip_special_tokens=True))  # the prompt ends within a character


def response_end_id(tokenizer: PreTrainedTokenizerBase, *, is_chat: bool) -> int:
    """The token that ends a response: the one that closes a turn in the chat template, or for plain text EOS."""
    turn_end = _turn_end(tokenizer) if is_chat else None
    return cast(int, tokenizer.eos_token_id) if turn_end is None else turn_end


def stop_ids_of(tokenizer: PreTrainedTokenizerBase, generation_eos: Iterable[int] = ()) -> list[int]:
    """Every token that ends a response: EOS of the tokenizer, the end of a turn, and the ids of generation_config.json."""
    return sorted({response_end_id(tokenizer, is_chat=is_chat) for is_chat in (False, True)} | set(generation_eos))


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens, such as BOS, that tokenizer(text) puts before a text."""
    if tokenizer not in _prefixes:
        plain, whole = _ids(tokenizer, "a"), cast(list[int], tokenizer("a")["input_ids"])
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        _prefixes[tokenizer] = whole[: next(starts, 0)]
    return _prefixes[tokenizer]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    if tokenizer not in _turn_ends:
        _turn_ends[tokenizer] = turn_end_id(tokenizer)
    return _turn_ends[tokenizer]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False)["input_ids"])


_prefixes: "WeakKeyDictionary[PreTrainedTokenizerBase, list[int]]" = WeakKeyDictionary()
_turn_ends: "WeakKeyDictionary[PreTrainedTokenizerBase, int | None]" = WeakKeyDictionary()
