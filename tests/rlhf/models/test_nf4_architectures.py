"""4-bit weights in models of other architectures: they compute what the dequantized weights compute, with adapters too."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from components.import_model.facts import require_adapters_that_count, require_lora_modules, require_quantizable
from components.rlhf.config.model import LoraConfig
from components.rlhf.models.loading import trainable_parameters
from components.rlhf.models.lora import add_adapters, merged_weights
from components.rlhf.models.nf4 import Nf4Linear, linear_layers, quantize_layers
from components.rlhf.text.errors import InputError
from tests.support.tiny_models import CannotBuild, causal_lm_types, example_ids, logits_of, tiny_model

FAST = ("llama", "qwen2", "gemma2", "opt", "mixtral", "mamba", "falcon_h1", "deepseek_v3", "minicpm3")
# Their own backward pass fails, or hashes of rounded states choose what they attend to; import_model refuses rwkv and reformer.
NOT_TRAINED = ("rwkv", "xlstm", "reformer")

# No list of layers, or no plain linear layers in it.
REFUSED = ("falcon", "gpt2", "gpt-sw3", "openai-gpt", "hrm_text", "longcat_flash", "blt")


def merge_into(plain: Any, lm: Any) -> None:
    """Give plain the weights that lm exports."""
    weights, parameters = dict(merged_weights(lm, lm.named_parameters())), dict(plain.named_parameters())
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def modules_for_adapters(lm: Any) -> tuple[str, ...]:
    """The names of linear layers that import_model accepts as target modules, each by itself."""
    names = []
    for name in sorted({path.rpartition(".")[2] for path in linear_layers(lm)}):
        try:
            require_lora_modules(lm, (name,), num_frozen_layers=0)
            require_adapters_that_count(lm, (name,))
            names.append(name)
        except InputError:
            continue
    return tuple(names)


def check(kind: str) -> None:
    try:
        lm = tiny_model(kind)
    except CannotBuild as error:
        pytest.skip(str(error))
    if kind in REFUSED:
        with pytest.raises(InputError):
            require_quantizable(lm)
        return
    plain, names, ids = copy.deepcopy(lm), modules_for_adapters(lm), example_ids()
    quantize_layers(lm, None, dtype=torch.float32)
    assert any(isinstance(module, Nf4Linear) for module in lm.modules())
    before = logits_of(plain, ids)
    merge_into(plain, lm)
    assert torch.equal(logits_of(lm, ids), logits_of(plain, ids))
    assert not torch.equal(logits_of(plain, ids), before)
    if not names or kind in NOT_TRAINED:
        return
    add_adapters(lm, LoraConfig(rank=4, target_modules=names), num_frozen_layers=0, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in trainable_parameters(lm):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logits.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in trainable_parameters(lm))
    merge_into(plain, lm)
    assert (logits_of(plain, ids) - logits).abs().max() < 1e-4 * max(1.0, float(logits.detach().abs().max()))


@pytest.mark.parametrize("kind", FAST)
def test_quantized_model_computes_with_its_exported_weights(kind: str) -> None:
    check(kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in causal_lm_types() if kind not in FAST])
def test_quantized_model_of_every_other_architecture(kind: str) -> None:
    check(kind)


def test_adapter_on_a_layer_that_is_not_called_is_refused() -> None:
    lm = tiny_model("jamba")
    before = {name: p.clone() for name, p in lm.named_parameters()}
    with pytest.raises(
        InputError, match=r"uses the weight of .*dt_proj without calling the layer.*remove dt_proj from"
    ):
        require_adapters_that_count(lm, ("q_proj", "dt_proj"))
    require_adapters_that_count(lm, ("q_proj", "in_proj"))
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_share_in_4_bits_is_told() -> None:
    assert require_quantizable(tiny_model("llama")).endswith("keeps 100% of the parameters of the layers in 4 bits")
    sentence = require_quantizable(tiny_model("mixtral"))
    assert "the rest, such as experts in one tensor, in the precision of the model" in sentence
    assert isinstance(tiny_model("mixtral").model.layers[0].self_attn.q_proj, nn.Linear)
