"""Tokenizers with the special tokens, the post-processor and the chat template of well-known model families."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

MESSAGES = "{% for m in messages %}"
END = "{% endfor %}"

# family: (special tokens, EOS, BOS or None, chat template)
CHATML = (
    MESSAGES + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n" + END,
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
FAMILIES: dict[str, tuple[list[str], str, str | None, str]] = {
    "qwen": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", None, "".join(CHATML)),
    "chatml with eos endoftext": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|endoftext|>",
        None,
        "".join(CHATML),
    ),
    "llama 3": (
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        "<|end_of_text|>",
        "<|begin_of_text|>",
        "<|begin_of_text|>{% set date = strftime_now('%d %b %Y') %}"
        "<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date }}<|eot_id|>"
        + MESSAGES
        + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        + END
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "gemma": (
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<eos>",
        "<bos>",
        "<bos>"
        + MESSAGES
        + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}<end_of_turn>\n"
        + END
        + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "phi 3": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|endoftext|>",
        None,
        MESSAGES
        + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n"
        + END
        + "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}",
    ),
    "llama 2": (
        ["<unk>", "<s>", "</s>"],
        "</s>",
        "<s>",
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
    ),
    "deepseek r1": (
        ["<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"],
        "<|end|>",
        "<|begin|>",
        "<|begin|>"
        "{% for m in messages %}{% if m['role'] == 'user' %}<|User|>{{ m['content'] }}"
        "{% else %}<|Assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
    ),
    "qwen 3": (  # writes the thoughts of the last answer only, and an empty thought where there is none
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        None,
        MESSAGES
        + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% set text = m['content'].split('</think>')[-1].strip() %}"
        "{% if loop.last %}<think>\n{{ (m['content'].split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m['content'] "
        "else '') }}\n</think>\n\n{% endif %}{{ text }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
        + END
        + CHATML[1],
    ),
    "chatml with marks": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        None,
        MESSAGES
        + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n" + END + CHATML[1],
    ),
    "chatml with tools": (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
        None,
        "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
        + MESSAGES
        + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{% for call in m['tool_calls'] or [] %}"
        '<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>'
        "{% endfor %}<|im_end|>\n" + END + CHATML[1],
    ),
    "no template": (["<s>", "</s>"], "</s>", "<s>", ""),
}


# The token that closes an answer in each family with a template.
TURN_ENDS = {
    "qwen": "<|im_end|>",
    "chatml with eos endoftext": "<|im_end|>",
    "llama 3": "<|eot_id|>",
    "gemma": "<end_of_turn>",
    "phi 3": "<|end|>",
    "llama 2": "</s>",
    "deepseek r1": "<|end|>",
    "qwen 3": "<|im_end|>",
    "chatml with marks": "<|im_end|>",
    "chatml with tools": "<|im_end|>",
}


def make_tokenizer(family: str, *, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of a family; with adds_eos tokenizer(text) also appends EOS."""
    special, eos, bos, template = FAMILIES[family]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    around = [bos] * (bos is not None) + ["$A"] + [eos] * adds_eos
    if len(around) > 1:
        names = {token for token in around if token != "$A"}
        backend.post_processor = TemplateProcessing(
            single=" ".join(around), special_tokens=[(token, backend.token_to_id(token)) for token in names]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token=bos)
    tokenizer.chat_template = template or None
    return tokenizer
