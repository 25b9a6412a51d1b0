"""A reward model with a tokenizer of its own: what it reads, and that its scores are those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from components.rlhf.data.chat import render_chat
from components.rlhf.data.records import Completion, Conversation, Message, Prompt
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rewards.text import reencode
from tests.support.chat_tokenizers import make_tokenizer

MESSAGES = (Message(role="user", content="Is it good?"),)
CHAT = Prompt(prompt="<user>Is it good?\n<assistant>", conversation=Conversation(messages=MESSAGES))
CPU, FP32 = torch.device("cpu"), torch.float32


def completion(prompt: Prompt, response: str, *, truncated: bool = False) -> Completion:
    return Completion(
        prompt=prompt, prompt_ids=[1], response_ids=[2], response=response, logprobs=None, truncated=truncated
    )


def read(family: str, found: Completion) -> str:
    """What the reward model of a family reads."""
    tokenizer = make_tokenizer(family)
    ids = reencode(tokenizer, found)
    assert len(ids.prompt_ids) == 1
    return str(tokenizer.decode([*ids.prompt_ids, *ids.response_ids]))


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen", "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"),
        ("gemma", "<bos><start_of_turn>user\nIs it good?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n"),
    ],
)
def test_conversation_is_rendered_with_the_reward_models_own_template(family: str, expected: str) -> None:
    assert read(family, completion(CHAT, "Yes.")) == expected


def test_truncated_response_is_not_closed() -> None:
    expected = "<|im_start|>user\nIs it good?<|im_end|>\n<|im_start|>assistant\nYes, bec"
    assert read("qwen", completion(CHAT, "Yes, bec", truncated=True)) == expected


@pytest.mark.parametrize("response", ["", "  \n", "e", "end", "<|im"])
@pytest.mark.parametrize("family", ["qwen", "gemma", "llama 3"])
def test_short_truncated_response_is_read_as_it_is(family: str, response: str) -> None:
    whole = read(family, completion(CHAT, response, truncated=True))
    assert whole == render_chat(make_tokenizer(family), MESSAGES) + response


def test_plain_text_has_the_special_tokens_of_the_reward_model() -> None:
    plain = Prompt(prompt="It is")
    assert read("gemma", completion(plain, " good.")) == "<bos>It is good.<eos>"
    assert read("gemma", completion(plain, " good", truncated=True)) == "<bos>It is good"
    assert read("qwen", completion(plain, " good.")) == "It is good.<|im_end|>"


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model as they are published: one label, a chat template of its own."""
    folder = tmp_path_factory.mktemp("public")
    tokenizer = make_tokenizer("gemma")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config)
    model.config.scored_as, model.config.reward_mean, model.config.reward_std = "text", 0.5, 2.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_are_those_that_transformers_gives_the_rendered_conversation(public: Path) -> None:
    tokenizer, model = make_tokenizer("gemma"), AutoModelForSequenceClassification.from_pretrained(public).eval()
    responses = ["Yes.", "No, it is much too long for what it has to say.", "!"]
    expected = []
    for response in responses:
        conversation = [{"role": "user", "content": "Is it good?"}, {"role": "assistant", "content": response}]
        ids: Any = tokenizer(tokenizer.apply_chat_template(conversation, tokenize=False), add_special_tokens=False)
        with torch.no_grad():
            expected.append(float(model(input_ids=torch.tensor([ids["input_ids"]])).logits[0, 0]))
    scorer = load_reward_scorer(public, dtype=FP32, device=CPU, microbatch_tokens=64)
    scores = scorer.score([completion(CHAT, response) for response in responses])
    assert scores.tolist() == pytest.approx([(raw - 0.5) / 2 for raw in expected], abs=1e-5)
