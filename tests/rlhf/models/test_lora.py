import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from components.rlhf.config.model import LoraConfig
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm, trainable_parameters
from components.rlhf.models.lora import adapters_enabled, add_adapters, merged_weights
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError
from tests.support.small_models import batch, trained_names
from tests.support.tiny_model import make_tiny_model

FP32, BF16 = torch.float32, torch.bfloat16
LORA = LoraConfig(rank=4, alpha=12.0)
IDS = torch.tensor([[5, 6, 7, 0, 9, 10]])


def adapted(folder: Path, *, frozen: int = 0, dtype: torch.dtype = FP32, seed: int = 1, lora: Any = LORA) -> Any:
    lm = load_causal_lm(folder, num_frozen_layers=frozen, dtype=dtype, trainable=False)
    add_adapters(lm, lora, num_frozen_layers=frozen, seed=seed)
    return lm


def adapted_scalar(folder: Path, *, frozen: int = 0, dtype: torch.dtype = FP32) -> Any:
    lm = load_scalar_lm(folder, num_frozen_layers=frozen, dtype=dtype, trainable=False, seed=5)
    add_adapters(lm, LORA, num_frozen_layers=frozen, seed=1)
    return lm


def randomize_trainable(lm: nn.Module) -> None:
    """Add random values to all trainable parameters, as if they had been trained."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in trainable_parameters(lm):
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def merged(lm: Any) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in merged_weights(lm, lm.named_parameters())}


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_adapters_are_fp32_and_only_in_unfrozen_layers(tiny_model: Path, frozen: int, dtype: torch.dtype) -> None:
    lm = adapted(tiny_model, frozen=frozen, dtype=dtype)
    names = trained_names(lm)
    assert len(names) == (3 - frozen) * len(LORA.target_modules) * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {int(name.split(".")[2]) for name in names} == set(range(frozen, 3))
    for name, parameter in lm.named_parameters():
        assert parameter.dtype == (FP32 if name in names else dtype), name


def test_new_adapters_do_not_change_the_output(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32, trainable=False)
    before = lm(IDS).logits
    add_adapters(lm, LORA, num_frozen_layers=0, seed=1)
    assert torch.equal(lm(IDS).logits, before)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_disabled_adapters_give_the_base_output_bit_for_bit(tiny_model: Path, dtype: torch.dtype) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=dtype, trainable=False)
    before = lm(IDS).logits
    add_adapters(lm, LORA, num_frozen_layers=0, seed=1)
    randomize_trainable(lm)
    adapted_logits = lm(IDS).logits
    assert not torch.equal(adapted_logits, before)
    trained = trained_names(lm)
    with adapters_enabled(lm, on=False):
        assert torch.equal(lm(IDS).logits, before)
    assert torch.equal(lm(IDS).logits, adapted_logits)
    assert trained_names(lm) == trained


def test_adapters_are_enabled_again_after_an_error(tiny_model: Path) -> None:
    lm = adapted(tiny_model)
    randomize_trainable(lm)
    before = lm(IDS).logits
    with pytest.raises(KeyError), adapters_enabled(lm, on=False):
        raise KeyError
    assert torch.equal(lm(IDS).logits, before)


def test_adapters_depend_only_on_seed(tiny_model: Path) -> None:
    def adapter_weights(seed: int, global_seed: int) -> list[Tensor]:
        torch.manual_seed(global_seed)
        return trainable_parameters(adapted(tiny_model, seed=seed))

    first, again, other = (
        adapter_weights(1, global_seed=0),
        adapter_weights(1, global_seed=9),
        adapter_weights(2, global_seed=0),
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    a_matrices = [(a, b) for a, b in zip(first, other, strict=True) if a.any()]
    assert len(a_matrices) == 3 * 7  # B is 0
    assert not any(torch.equal(a, b) for a, b in a_matrices)


def test_only_adapters_have_gradients(tiny_model: Path) -> None:
    actor = Actor(adapted(tiny_model, frozen=1), num_frozen_layers=1, dtype=FP32)
    randomize_trainable(actor)
    actor(batch(), SamplingDistribution())[0].sum().backward()
    with_gradient = {name for name, p in actor.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == trained_names(actor)
    assert all(".lora_" in name for name in with_gradient)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_scalar_head_is_trained_in_fp32_with_adapters(tiny_model: Path, dtype: torch.dtype) -> None:
    model = ScalarModel(adapted_scalar(tiny_model, frozen=1, dtype=dtype), num_frozen_layers=1, dtype=dtype)
    randomize_trainable(model)
    model.scores(batch()).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == trained_names(model)
    assert {name for name in with_gradient if ".lora_" not in name} == {"lm.score.weight"}
    assert model.lm.score.weight.dtype == FP32


def test_reference_is_the_actor_without_adapters(tiny_model: Path) -> None:
    lm = adapted(tiny_model, frozen=1)
    actor, reference = (Actor(lm, num_frozen_layers=1, dtype=FP32, with_adapters=on) for on in (True, False))
    first = actor(batch(), SamplingDistribution())[0]
    assert torch.equal(first, reference(batch(), SamplingDistribution())[0])
    randomize_trainable(lm)
    assert not torch.equal(actor(batch(), SamplingDistribution())[0], first)
    assert torch.equal(reference(batch(), SamplingDistribution())[0], first)


def test_unknown_target_modules_are_rejected(tiny_model: Path) -> None:
    lora = LoraConfig(target_modules=("q_proj", "c_attn", "lm_head"))
    with pytest.raises(InputError) as error:
        adapted(tiny_model, lora=lora)
    assert str(error.value) == (
        "model.lora.target_modules names c_attn, lm_head, which no layer of LlamaForCausalLM has; "
        "choose among down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."
    )


def test_freezing_all_layers_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="num_frozen_layers is 3, but the model has 3 layers"):
        adapted(tiny_model, frozen=3)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_merged_weights_have_names_shapes_and_dtypes_of_the_base_model(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=2, tied=tied)
    plain = load_causal_lm(folder, num_frozen_layers=1, dtype=BF16, trainable=False)
    found = merged(adapted(folder, frozen=1, dtype=BF16))
    expected = {name: (p.shape, p.dtype) for name, p in plain.named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in found.items()} == expected
    assert list(found) == [name for name, _ in plain.named_parameters()]
    assert all(torch.equal(found[name], p) for name, p in plain.named_parameters())  # B is 0


def test_merged_weight_equals_formula(tiny_model: Path) -> None:
    lm = adapted(tiny_model)
    randomize_trainable(lm)
    layer = lm.model.layers[1].mlp.up_proj
    expected = layer.base_layer.weight + 12.0 / 4 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(merged(lm)["model.layers.1.mlp.up_proj.weight"], expected)


def test_merged_weights_give_the_same_logits(tiny_model: Path) -> None:
    lm = adapted(tiny_model, frozen=1)
    randomize_trainable(lm)
    plain = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32, trainable=False)
    before = plain(IDS).logits
    plain.load_state_dict(merged(lm), strict=False)
    logits = lm(IDS).logits
    assert (logits - before).abs().max() > 0.1
    torch.testing.assert_close(plain(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_merging_keeps_biases(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32, trainable=False)
    lm.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.arange(32.0))
    add_adapters(lm, LORA, num_frozen_layers=0, seed=1)
    assert torch.equal(merged(lm)["model.layers.0.self_attn.q_proj.bias"], torch.arange(32.0))


def test_merging_keeps_no_references_to_streamed_weights(tiny_model: Path) -> None:
    """An engine with sharded weights gathers one at a time, and frees it before the next."""

    def gather_one_by_one() -> Any:
        for name, parameter in lm.named_parameters():
            buffer = parameter.detach().clone()
            yield name, buffer
            buffer.fill_(float("nan"))

    lm = adapted(tiny_model)
    randomize_trainable(lm)
    expected = merged(lm)
    found = {name: weight.clone() for name, weight in merged_weights(lm, gather_one_by_one())}
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_merging_does_not_change_the_model(tiny_model: Path) -> None:
    lm = adapted(tiny_model)
    randomize_trainable(lm)
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    merged(lm)
    assert all(torch.equal(p, before[name]) for name, p in lm.named_parameters())


def test_actor_exports_weights_under_base_model_names(tiny_model: Path) -> None:
    for lm in (adapted(tiny_model), load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)):
        actor = Actor(lm, num_frozen_layers=0, dtype=FP32)
        found = dict(actor.export_weights((name, p.detach()) for name, p in actor.named_parameters()))
        plain = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)
        assert found.keys() == dict(plain.named_parameters()).keys()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_merged_folder_and_peft_adapter_give_the_same_logits(tmp_path: Path, tied: bool, frozen: int) -> None:
    start = make_tiny_model(tmp_path / "start", seed=2, tied=tied)
    lm = adapted(start, frozen=frozen)
    randomize_trainable(lm)
    logits = lm(IDS).logits
    save_model(lm, AutoTokenizer.from_pretrained(start), tmp_path / "saved", dtype=FP32)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    expected = set(load_file(start / "model.safetensors"))
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == expected
    torch.testing.assert_close(loaded(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(start)
    assert (base(IDS).logits - logits).abs().max() > 0.1
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "saved" / "adapter").eval()
    torch.testing.assert_close(with_adapter(IDS).logits, logits, rtol=1e-5, atol=1e-5)


def test_reward_model_is_saved_merged_and_as_adapter_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    lm = adapted_scalar(tiny_model, frozen=1)
    randomize_trainable(lm)
    ids = torch.tensor([[5, 6, 7, 9, 10]])
    logits = lm(ids).logits
    save_model(lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path, dtype=FP32)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, logits, rtol=1e-4, atol=1e-4)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    with_adapter = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(with_adapter(ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_merged_bf16_weights_are_rounded_once(tiny_model: Path, tmp_path: Path) -> None:
    lm = adapted(tiny_model, dtype=BF16)
    randomize_trainable(lm)
    save_model(lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path, dtype=BF16)
    layer = lm.model.layers[0].mlp.up_proj
    expected = layer.base_layer.weight.float() + 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    saved = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(saved["model.layers.0.mlp.up_proj.weight"].float(), expected, rtol=2**-8, atol=0)
    assert {weight.dtype for weight in saved.values()} == {BF16}
    assert {weight.dtype for weight in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()} == {FP32}


def test_adapter_files_are_reproducible_and_world_readable(tiny_model: Path, tmp_path: Path) -> None:
    lm = adapted(tiny_model, frozen=1)
    for name in ("a", "b"):
        save_model(lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path / name, dtype=FP32)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        paths = [tmp_path / name / "adapter" / file for name in ("a", "b")]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert paths[0].stat().st_mode & 0o044 == 0o044
    config = json.loads((tmp_path / "a" / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(LORA.target_modules)  # peft's own order depends on the hash seed
    assert config["layers_to_transform"] == [1, 2]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 12.0, None)


def test_no_adapter_folder_without_adapters(tiny_model: Path, tmp_path: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)
    save_model(lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path, dtype=FP32)
    assert not (tmp_path / "adapter").exists()
