"""A reward model with a tokenizer of its own: responses reach it as text, through its own chat template."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from components.rlhf.data.chat import render_chat
from components.rlhf.data.records import Completion, Message
from components.rlhf.data.tokenizer import encode_prompt
from components.rlhf.rewards.protocol import ComputedStates, Scorer


class TextScorer:
    """Encodes the text of each response with the reward model's tokenizer, and scores that. Implements Scorer."""

    def __init__(self, scorer: Scorer, tokenizer: PreTrainedTokenizerBase) -> None:
        """scorer computes with the ids of completions, of which the tokenizer must be this one."""
        self.scorer = scorer
        self.tokenizer = tokenizer

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        # Computed with other ids, so of no use here.
        return self.scorer.score([reencode(self.tokenizer, completion) for completion in completions])


def reencode(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> Completion:
    """The completion in the ids of another tokenizer.

    A conversation is rendered with that tokenizer's chat template, as public reward models are used; plain text is prompt and
    response with the special tokens of that tokenizer. The text of a truncated response is not closed.
    """
    conversation, response = completion.prompt.conversation, completion.response
    if conversation is not None and tokenizer.chat_template:
        messages, tools = conversation.messages, conversation.tools
        if completion.truncated:
            text = render_chat(tokenizer, messages, tools=tools) + response
        else:
            answer = Message(role="assistant", content=response)
            text = render_chat(tokenizer, [*messages, answer], tools=tools, add_generation_prompt=False)
        ids = encode_prompt(tokenizer, text, is_chat=True)
    else:
        ids = encode_prompt(tokenizer, completion.prompt.prompt + response)
        if not completion.truncated:
            ids = [*ids, int(tokenizer.eos_token_id)]
    return replace(completion, prompt_ids=ids[:1], response_ids=ids[1:], logprobs=None, response_mask=None, turns=())
