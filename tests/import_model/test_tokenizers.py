"""import_model on models whose tokenizer, config, weights and settings contradict each other, or whose architecture is not exact."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import encode_text, load_tokenizer
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.models.saving import save_model
from components.rlhf.rollout.hf import HfRolloutEngine
from tests.import_model.test_import_model import import_artifact, refusal, run
from tests.support.architectures import make_folder as make_architecture
from tests.support.chat_tokenizers import FAMILIES, make_tokenizer
from tests.support.tiny_model import make_tiny_tokenizer


def make_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    generation_eos: int | list[int] | None = None,
    **config: Any,
) -> Path:
    defaults = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**(defaults | config)))
    eos = tokenizer.eos_token_id if generation_eos is None else generation_eos
    model.generation_config = GenerationConfig(eos_token_id=eos)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "no template"])
def test_every_end_of_a_response_stops_rollouts_and_is_exported(family: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(family)
    source = make_folder(tmp_path / "source", tokenizer, generation_eos=7)
    done = run(source, tmp_path / "out", is_chat=True)
    assert done.exit_code == 0, done.stderr
    assert "training ends a text with" in done.stderr
    ends = {
        encode_text(tokenizer, "x", "y", max_tokens=9, is_chat=is_chat).response_ids[-1] for is_chat in (True, False)
    }
    assert set(load_stop_ids(tmp_path / "out")) == ends | {7}
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == sorted(ends | {7})
    for stop in ends | {7}:  # a model that always ends its response with this token
        lm = load_causal_lm(tmp_path / "out", num_frozen_layers=0, dtype=torch.float32, trainable=False)
        with torch.no_grad():
            lm.lm_head.weight.zero_()
            lm.model.norm.weight.zero_()
        lm.lm_head = torch.nn.Linear(32, len(tokenizer))
        torch.nn.init.zeros_(lm.lm_head.weight)
        torch.nn.init.constant_(lm.lm_head.bias, -50.0)
        with torch.no_grad():
            lm.lm_head.bias[stop] = 50.0
        engine = HfRolloutEngine(lm, tokenizer, stop_ids=load_stop_ids(tmp_path / "out"))
        (found,) = engine.generate([Prompt(prompt="Hi")], SamplingConfig(max_new_tokens=5), [1])
        assert (found.response_ids, found.truncated) == ([stop], False)


def test_tokens_without_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    size = len(tokenizer)
    source = make_folder(tmp_path / "source", tokenizer)
    tokenizer.add_tokens(["zebra", "yak"])
    tokenizer.save_pretrained(source)
    assert refusal(source, tmp_path / "out") == (
        f"{source}: the tokenizer has {size + 2} tokens, but the model embeds only the ids below {size} ('zebra' is {size}); "
        "resize the model's embeddings, or save the tokenizer that it was trained with."
    )


def test_embedding_may_be_padded(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer(), vocab_size=320)
    assert import_artifact(source, tmp_path / "out").facts["num_layers"] == 2


def test_stop_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer(), generation_eos=[0, 5000])
    assert "eos_token_id 5,000 in generation_config.json or config.json is beyond the 257 ids" in refusal(
        source, tmp_path / "out"
    )


@pytest.mark.parametrize(("length", "accepted"), [(128, True), (129, False)])
def test_texts_longer_than_the_context_are_refused(tmp_path: Path, length: int, accepted: bool) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer())
    if accepted:
        assert run(source, tmp_path / "out", max_sequence_tokens=length).exit_code == 0
        return
    message = refusal(source, tmp_path / "out", max_sequence_tokens=length)
    assert (
        "may have 129 tokens together, but the model has only 128 positions (max_position_embeddings); lower" in message
    )


def test_scaled_rope_extends_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
    source = make_folder(tmp_path / "source", make_tiny_tokenizer(), rope_parameters=rope)
    assert run(source, tmp_path / "out", max_sequence_tokens=512).exit_code == 0
    assert "only 512 positions" in refusal(source, tmp_path / "other", max_sequence_tokens=513)


def test_chat_without_template_is_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tokenizer("no template"))
    assert run(source, tmp_path / "out").exit_code == 0
    assert "data.template is chat, but the tokenizer has no chat template" in refusal(
        source, tmp_path / "other", is_chat=True
    )


def test_unknown_lora_modules_are_refused(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer())
    message = refusal(source, tmp_path / "out", lora_modules=["q_proj", "c_attn"])
    assert (
        "model.lora.target_modules names c_attn, which no layer of LlamaForCausalLM has; choose among down_proj"
        in message
    )


def test_weights_that_the_config_does_not_use_are_refused(tmp_path: Path) -> None:
    """config.json says that there are no biases, but the weights were trained with them."""
    source = make_folder(tmp_path / "source", make_tiny_tokenizer(), attention_bias=True)
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_bias": False}))
    message = refusal(source, tmp_path / "out")
    assert "has the weights model.layers.0.self_attn.k_proj.bias, " in message
    assert "which LlamaForCausalLM does not use with this config.json" in message


def test_weights_of_another_head_are_left_out(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer())
    weights = load_file(source / "model.safetensors")
    weights["vision_tower.patch.weight"] = torch.zeros(3, 3)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert run(source, tmp_path / "out").exit_code == 0


def test_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        eos_token_id=0, pad_token_id=0, initializer_range=0.3, is_decoder=False,
    )  # fmt: skip
    source = tmp_path / "source"
    BertLMHeadModel(config).save_pretrained(source)
    tokenizer.save_pretrained(source)
    message = refusal(source, tmp_path / "out")
    assert message.startswith(
        "BertLMHeadModel (bert) is not causal: a later token changes the log-probs of earlier ones by up to "
    )
    assert message.endswith("nats per token (0.002 is tolerated); choose a causal language model.")


@pytest.mark.parametrize("frozen", [2, 3])
def test_freezing_every_layer_is_refused(tmp_path: Path, frozen: int) -> None:
    source = make_folder(tmp_path / "source", make_tiny_tokenizer())
    message = refusal(source, tmp_path / "out", num_frozen_layers=frozen)
    assert f"model.num_frozen_layers is {frozen}, but the model has 2 layers" in message


def test_imported_tokenizer_gives_plain_text_its_bos(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", make_tokenizer("gemma"))
    manifest = import_artifact(source, tmp_path / "out")
    assert manifest.facts["special_prefix"] == "<bos>"
    tokenizer = load_tokenizer(tmp_path / "out")
    encoded = encode_text(tokenizer, "It is", " good", max_tokens=99)
    assert encoded.prompt_ids == tokenizer("It is")["input_ids"]


@pytest.mark.parametrize(("longest", "accepted"), [(64, True), (65, False)])
def test_positions_that_depend_on_the_longest_text_of_a_batch_are_refused(
    tmp_path: Path, longest: int, accepted: bool
) -> None:
    rope = {
        "rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0,
        "short_factor": [1.0] * 4, "long_factor": [3.0] * 4,
    }  # fmt: skip
    source = make_folder(tmp_path / "source", make_tiny_tokenizer(), rope_parameters=rope)
    if accepted:
        assert run(source, tmp_path / "out", max_sequence_tokens=longest).exit_code == 0
    else:
        message = refusal(source, tmp_path / "out", max_sequence_tokens=longest)
        assert (
            "with longrope RoPE the positions of all texts of a batch change when one is longer than 64 tokens"
            in message
        )


def test_special_token_that_no_text_uses_needs_no_embedding(tmp_path: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    source = make_folder(tmp_path / "source", tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(source)
    assert run(source, tmp_path / "out").exit_code == 0
    tokenizer.chat_template = "<image>" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(source)
    assert "'<image>' is 257" in refusal(source, tmp_path / "other")


@pytest.mark.parametrize(
    ("kind", "modules", "reason"),
    [
        ("zamba2", ["gate_up_proj"], "layers share these weights"),
        ("deepseek_v3", ["down_proj"], "cannot have LoRA adapters on down_proj"),
        ("glm4_moe", ["o_proj", "down_proj"], "cannot have LoRA adapters on o_proj, down_proj"),
        ("gpt2", ["c_attn"], "it has no linear modules; set model.lora to null"),
        (
            "jamba",
            ["q_proj", "dt_proj"],
            "without calling the layer, so that an adapter would have no effect; remove dt_proj",
        ),
        ("falcon", ["query_key_value"], ""),
        ("mixtral", ["q_proj", "o_proj"], ""),
        ("opt", ["q_proj", "fc1"], ""),
    ],
)
def test_adapters_that_cannot_be_trained_or_merged_are_refused(
    kind: str, modules: list[str], reason: str, tmp_path: Path
) -> None:
    source = make_architecture(kind, tmp_path / "source")
    if reason:
        assert reason in refusal(source, tmp_path / "out", lora_modules=modules)
    else:
        done = run(source, tmp_path / "out", lora_modules=modules)
        assert done.exit_code == 0, done.stderr


def test_import_keeps_the_4_bits_of_an_artifact(tmp_path: Path) -> None:
    start = make_folder(tmp_path / "start", make_tiny_tokenizer())
    lm = load_causal_lm(start, num_frozen_layers=0, dtype=torch.float32, trainable=False, quantization="nf4")
    save_model(lm, load_tokenizer(start), tmp_path / "source", dtype=torch.float32)
    assert run(tmp_path / "source", tmp_path / "out").exit_code == 0
    files = [folder / "nf4" / "weights.safetensors" for folder in (tmp_path / "source", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_model_is_checked_for_4_bits(tmp_path: Path) -> None:
    source = make_architecture("falcon", tmp_path / "falcon")
    message = refusal(source, tmp_path / "out", lora_modules=["query_key_value"], quantization="nf4")
    assert "no linear layers that could be kept in 4 bits; set model.lora.quantization to null" in message
    done = run(
        make_architecture("mixtral", tmp_path / "mixtral"),
        tmp_path / "other",
        lora_modules=["q_proj", "o_proj"],
        quantization="nf4",
    )
    assert done.exit_code == 0, done.stderr
    assert "model.lora.quantization keeps" in done.stderr and "the rest, such as experts in one tensor" in done.stderr


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "got_ocr2", "fuyu", "llama4_text"])
def test_config_without_pad_token_is_imported(kind: str, tmp_path: Path) -> None:
    source = make_architecture(kind, tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((source / name).read_text())
        content.pop("pad_token_id", None)
        (source / name).write_text(json.dumps(content))
    done = run(source, tmp_path / "out")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert GenerationConfig.from_pretrained(tmp_path / "out").pad_token_id == 0
