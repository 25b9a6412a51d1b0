from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from components.rlhf.models.layers import (
    apply_head,
    enable_gradient_checkpointing,
    freeze_lower_layers,
    layers_of,
    run_layers,
    share_trunk,
)
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.text.errors import InputError
from tests.support.small_models import trained_names
from tests.support.tiny_model import make_tiny_model

IDS = torch.tensor([[5, 6, 7, 0, 9, 10], [1, 2, 3, 4, 5, 6]])
FP32 = torch.float32


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("untied") / "model", seed=1, tied=False)


def frozen_lm(folder: Path, frozen: int) -> Any:
    return load_causal_lm(folder, num_frozen_layers=frozen, dtype=FP32)


@pytest.mark.parametrize("split", [1, 2, 3])
def test_two_ranges_equal_the_plain_forward_bit_for_bit(tiny_model: Path, split: int) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    lower = run_layers(lm, IDS, stop=split)
    upper = run_layers(lm, IDS, start=split, states=lower).last_hidden_state
    plain = lm(IDS, output_hidden_states=True).hidden_states  # the last one is after the norm
    assert torch.equal(upper, plain[-1])
    if split < 3:
        assert torch.equal(lower, plain[split])


def test_running_a_range_or_the_head_does_not_change_the_model(tiny_model: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    before, hooks = lm(IDS).logits, sum(len(module._forward_hooks) for module in lm.modules())
    for _ in range(2):
        states = run_layers(lm, IDS, stop=1)
        apply_head(lm, run_layers(lm, IDS, start=1, states=states).last_hidden_state[0])
    assert len(lm.model.layers) == 3
    assert torch.equal(lm(IDS).logits, before)
    after = sum(len(module._forward_hooks) for module in lm.modules())
    states = run_layers(lm, IDS, stop=1)
    assert sum(len(module._forward_hooks) for module in lm.modules()) == after >= hooks


def test_model_without_a_list_of_layers_cannot_be_frozen() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=1, n_positions=8))
    assert layers_of(gpt2) is gpt2.transformer.h
    gpt2.transformer.h = torch.nn.ModuleList([gpt2.transformer.h[0]])
    with pytest.raises(InputError, match="GPT2Model does not keep its 2 layers in a list, so they cannot be frozen"):
        layers_of(gpt2)


def test_frozen_layers_and_embeddings_are_not_trained(tiny_model: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    freeze_lower_layers(lm, 2)
    names = trained_names(lm)
    assert names
    assert all(name.startswith(("model.layers.2.", "model.norm.")) for name in names), names
    assert not lm.lm_head.weight.requires_grad  # tied: it is the embeddings


def test_untied_head_stays_trainable(untied: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(untied)
    freeze_lower_layers(lm, 2)
    assert "lm_head.weight" in trained_names(lm)
    assert "model.embed_tokens.weight" not in trained_names(lm)


def test_zero_freezes_nothing(tiny_model: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    freeze_lower_layers(lm, 0)
    assert trained_names(lm) == {name for name, _ in lm.named_parameters()}


def test_freezing_too_many_layers_is_rejected(tiny_model: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    with pytest.raises(InputError, match="num_frozen_layers is 4, but the model has 3 layers; choose at most 2"):
        freeze_lower_layers(lm, 4)


NUM_FROZEN = 2


def four_models(folder: Path) -> list[Any]:
    """Actor, reference, and two models with scalar heads."""
    scalar = {"num_frozen_layers": NUM_FROZEN, "dtype": FP32, "seed": 3}
    return [
        frozen_lm(folder, NUM_FROZEN),
        frozen_lm(folder, NUM_FROZEN),
        load_scalar_lm(folder, **scalar),
        load_scalar_lm(folder, **scalar),
    ]


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_equal_trunks_become_the_same_modules(tiny_model: Path, untied: Path, kind: str) -> None:
    models = four_models(tiny_model if kind == "tied" else untied)
    before = [model(IDS).logits.detach() for model in models]
    num_unshared = _unique_parameters(models)
    assert share_trunk(models[0], models[1:], NUM_FROZEN)
    for model in models[1:]:
        for index in range(NUM_FROZEN):
            assert model.model.layers[index] is models[0].model.layers[index]
        assert model.model.layers[NUM_FROZEN] is not models[0].model.layers[NUM_FROZEN]
        assert model.get_input_embeddings() is models[0].get_input_embeddings()
    for model, logits in zip(models, before, strict=True):
        assert torch.equal(model(IDS).logits, logits)
    trunk = sum(p.numel() for layer in models[0].model.layers[:NUM_FROZEN] for p in layer.parameters())
    trunk += models[0].get_input_embeddings().weight.numel()
    assert num_unshared - _unique_parameters(models) == 3 * trunk


def test_tied_head_is_shared_and_untied_head_is_not(tiny_model: Path, untied: Path) -> None:
    owner, other, *_ = models = four_models(tiny_model)
    share_trunk(owner, models[1:], NUM_FROZEN)
    assert other.lm_head.weight is owner.get_input_embeddings().weight
    owner, other, *_ = models = four_models(untied)
    share_trunk(owner, models[1:], NUM_FROZEN)
    assert other.lm_head.weight is not owner.lm_head.weight


def test_one_unequal_trunk_prevents_sharing(tiny_model: Path, tmp_path: Path) -> None:
    models = four_models(tiny_model)
    with torch.no_grad():
        models[-1].model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    modules_before = [list(model.modules()) for model in models]
    assert not share_trunk(models[0], models[1:], NUM_FROZEN)
    for model, modules in zip(models, modules_before, strict=True):
        assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_other_shape_precision_or_depth_is_unequal(tiny_model: Path, tmp_path: Path) -> None:
    owner = frozen_lm(tiny_model, 2)
    wider = frozen_lm(make_tiny_model(tmp_path / "wider", seed=0, hidden_size=48), 2)
    bf16 = load_causal_lm(tiny_model, num_frozen_layers=2, dtype=torch.bfloat16)
    shallow = load_causal_lm(
        make_tiny_model(tmp_path / "shallow", seed=0, num_layers=1),
        num_frozen_layers=2,
        dtype=FP32,
        trainable=False,
    )
    for other in (wider, bf16, shallow):
        assert not share_trunk(owner, [other], 2)


def test_equal_values_in_another_dtype_are_unequal(tiny_model: Path) -> None:
    """If shared, one model would compute in the dtype of the other."""
    bf16 = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False)
    same_values = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False).float()
    assert not share_trunk(same_values, [bf16], 1)


def test_layers_with_other_parameters_are_unequal(tiny_model: Path) -> None:
    owner, other = frozen_lm(tiny_model, 1), frozen_lm(tiny_model, 1)
    projection = other.model.layers[0].self_attn.q_proj
    projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))
    assert not share_trunk(owner, [other], 1)


def test_nothing_is_shared_without_frozen_layers(tiny_model: Path) -> None:
    owner, other = frozen_lm(tiny_model, 0), frozen_lm(tiny_model, 0)
    assert not share_trunk(owner, [other], 0)
    assert other.get_input_embeddings() is not owner.get_input_embeddings()


def test_scalar_head_is_not_tied(tiny_model: Path) -> None:
    owner = frozen_lm(tiny_model, 1)
    other = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    score = other.score.weight
    assert share_trunk(owner, [other], 1)
    assert other.score.weight is score


def _unique_parameters(models: list[Any]) -> int:
    return sum(p.numel() for p in {id(p): p for model in models for p in model.parameters()}.values())


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_checkpointing_recomputes_layers_with_the_same_gradients(tiny_model: Path, checkpointed: bool) -> None:
    lm, plain = (load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32) for _ in range(2))
    if checkpointed:
        enable_gradient_checkpointing(lm)
    calls = []
    for layer in lm.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[5, 6, 7, 8]])
    for model in (lm, plain):
        run_layers(model, ids).last_hidden_state.square().sum().backward()
    assert len(calls) == len(lm.model.layers) * (2 if checkpointed else 1)
    assert not lm.model.layers[0].mlp.training  # dropout stays off
    for parameter, expected in zip(lm.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_models_with_other_windows_do_not_share_layers(tiny_model: Path) -> None:
    """Their weights are equal, and so are the states of texts shorter than the window."""
    first, second = frozen_lm(tiny_model, 1), frozen_lm(tiny_model, 1)
    assert share_trunk(first, [frozen_lm(tiny_model, 1)], 1)
    second.config.rope_parameters = {**second.config.rope_parameters, "factor": 4.0}
    assert not share_trunk(first, [second], 1)
