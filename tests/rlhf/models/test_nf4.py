"""4-bit weights: against a slow implementation of NF4, and in models, artifacts and the stages that follow each other."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf.config.model import LoraConfig, TrainingConfig
from components.rlhf.engine.factory import prepare_frozen_model
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.layers import enable_gradient_checkpointing
from components.rlhf.models.loading import (
    cast_parameters,
    load_causal_lm,
    load_scalar_lm,
    trainable_parameters,
)
from components.rlhf.models.lora import adapters_enabled, add_adapters, merged_weights
from components.rlhf.models.nf4 import Nf4Linear, pack, quantize_layers, share_in_4_bits, unpack
from components.rlhf.models.saving import save_model
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model

FP32, BF16 = torch.float32, torch.bfloat16
LORA = LoraConfig(rank=4, alpha=12.0, quantization="nf4")
IDS = torch.tensor([[5, 6, 7, 0, 9, 10]])
# Appendix E of the paper: quantiles of a normal distribution, with an exact 0, scaled to [-1, 1].
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def dynamic_code() -> Tensor:
    """The signed 8-bit code of Dettmers 2022 for the scales: decades with 1 to 64 values each, 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        bounds = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        values += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(values))


def nearest(values: Tensor, code: Tensor) -> Tensor:
    return code[(values[:, None] - code).abs().argmin(1)]


def slow_round_trip(weight: Tensor) -> Tensor:
    """NF4 with double quantization, value by value."""
    blocks = weight.flatten().split(64)
    scales = torch.stack([block.abs().max() for block in blocks])
    mean = scales.mean()
    rounded = torch.cat(
        [nearest(part / part.abs().max(), dynamic_code()) * part.abs().max() for part in (scales - mean).split(256)]
    )
    codes = [nearest(block / scale, torch.tensor(NF4)) for block, scale in zip(blocks, scales, strict=True)]
    return torch.cat([c * (r + mean) for c, r in zip(codes, rounded, strict=True)]).view(weight.shape)


def random_weight(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 40), columns=st.integers(1, 90), seed=st.integers(0, 2**31 - 1))
def test_round_trip_is_that_of_the_paper(rows: int, columns: int, seed: int) -> None:
    weight = random_weight(rows, columns, seed)
    if rows * columns <= 64:  # one scale, which is the mean of the scales: there is nothing to quantize twice
        expected = (
            nearest(weight.flatten() / weight.abs().max(), torch.tensor(NF4)).view(weight.shape) * weight.abs().max()
        )
    else:
        expected = slow_round_trip(weight)
    found = unpack(pack(weight), (rows, columns), FP32)
    assert (found - expected).abs().max() < 1e-5
    assert torch.equal(unpack(pack(weight), (rows, columns), BF16), found.to(BF16))


def test_more_scales_than_one_block_of_them() -> None:
    weight = random_weight(300, 80, 1)  # 375 scales
    assert (unpack(pack(weight), (300, 80), FP32) - slow_round_trip(weight)).abs().max() < 1e-5


def test_zeros_stay_zeros() -> None:
    assert not unpack(pack(torch.zeros(70, 64)), (70, 64), FP32).any()


def test_bits_per_value() -> None:
    assert len(pack(torch.zeros(512, 512))) * 8 / 512**2 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=0.01)


def layer_of(weight: Tensor, *, dtype: torch.dtype = FP32, rank: int = 0) -> Nf4Linear:
    size = (weight.shape[0], weight.shape[1])
    low_rank = (random_weight(rank, size[1], 2), random_weight(size[0], rank, 3)) if rank else None
    bias = nn.Parameter(torch.arange(float(size[0])), requires_grad=False)
    return Nf4Linear(size, pack(weight), bias=bias, dtype=dtype, low_rank=low_rank)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("autocast", [False, True])
def test_layer_computes_what_a_linear_layer_of_its_weight_computes(rank: int, autocast: bool) -> None:
    layer, plain = layer_of(random_weight(40, 24, 1), rank=rank), nn.Linear(24, 40)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    x = random_weight(7, 24, 4)
    results = []
    for module in (layer, plain):
        given = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=BF16, enabled=autocast):
            y = module(given)
        y.float().square().sum().backward()
        results.append((y, given.grad))
    (y, gradient), (expected, expected_gradient) = results
    assert y.dtype == expected.dtype == (BF16 if autocast else FP32)
    assert torch.equal(y, expected)
    assert torch.equal(gradient, expected_gradient)


def test_no_weight_is_kept_for_the_backward_pass() -> None:
    layer = layer_of(random_weight(64, 64, 1))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        layer(torch.ones(1, 64, requires_grad=True))
    assert max(saved, default=0) < 64 * 64


@pytest.mark.parametrize("cast", ["bfloat16", "double", "half", "cast_parameters", "frozen_model"])
def test_no_cast_of_the_model_changes_the_weight(cast: str) -> None:
    layer = layer_of(random_weight(40, 24, 1), rank=3)
    before = layer.weight
    if cast == "cast_parameters":
        cast_parameters(layer, BF16)
    elif cast == "frozen_model":
        training = TrainingConfig(engine="deepspeed")
        prepare_frozen_model(layer, training, group=SINGLE_PROCESS, dtype=BF16)
    else:
        getattr(layer, cast)()
    assert (layer.bias.dtype != FP32) == (cast != "frozen_model")
    assert layer.nf4.dtype == torch.uint8
    assert torch.equal(layer.weight, before)


def quantized(folder: Path, *, frozen: int = 0, dtype: torch.dtype = FP32, scalar: bool = False) -> Any:
    options: dict[str, Any] = dict(num_frozen_layers=frozen, dtype=dtype, trainable=False, quantization="nf4")
    return load_scalar_lm(folder, seed=5, **options) if scalar else load_causal_lm(folder, **options)


def adapted(folder: Path, *, frozen: int = 0, dtype: torch.dtype = FP32, scalar: bool = False, seed: int = 1) -> Any:
    lm = quantized(folder, frozen=frozen, dtype=dtype, scalar=scalar)
    add_adapters(lm, LORA, num_frozen_layers=frozen, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(lm):
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return lm


def save(lm: Any, start: Path, folder: Path, dtype: torch.dtype = FP32) -> Path:
    save_model(lm, AutoTokenizer.from_pretrained(start), folder, dtype=dtype)
    return folder


def test_linear_layers_of_all_decoder_layers_are_in_4_bits(tiny_model: Path) -> None:
    lm = quantized(tiny_model, frozen=1)
    kinds = {name: type(module) for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind is nn.Linear} == {"lm_head"}
    assert len(kinds) == 1 + 3 * 7
    assert share_in_4_bits(load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)) > 0.98
    assert {p.dtype for name, p in lm.named_parameters() if not name.endswith("nf4")} == {FP32}
    assert not any(p.requires_grad for p in lm.parameters())


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_adapters_are_fp32_and_their_base_is_frozen(tiny_model: Path, dtype: torch.dtype) -> None:
    lm = adapted(tiny_model, frozen=1, dtype=dtype)
    trained = {name: p.dtype for name, p in lm.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and set(trained.values()) == {FP32}
    with torch.autocast("cpu", dtype=BF16, enabled=dtype == BF16):
        lm(IDS).logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trainable_parameters(lm))


def test_gradient_checkpointing_does_not_change_the_gradient(tiny_model: Path) -> None:
    gradients = []
    for checkpointed in (False, True):
        lm = adapted(tiny_model)
        if checkpointed:
            enable_gradient_checkpointing(lm)
        lm(IDS, use_cache=False).logits.square().sum().backward()
        gradients.append([p.grad for p in trainable_parameters(lm)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_merged_weight_is_the_dequantized_one_and_the_update_rounded_once(tiny_model: Path) -> None:
    for dtype in (FP32, BF16):
        lm = adapted(tiny_model, frozen=1, dtype=dtype)
        merged = dict(merged_weights(lm, lm.named_parameters()))
        layer = lm.model.layers[1].mlp.up_proj
        plain = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=dtype, trainable=False)
        packed = pack(plain.model.layers[1].mlp.up_proj.weight)
        base = unpack(packed, (layer.out_features, layer.in_features), FP32)
        expected = base + 12.0 / 4 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        found = merged["model.layers.1.mlp.up_proj.weight"]
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected.to(dtype), rtol=2**-8 if dtype == BF16 else 1e-6, atol=1e-6)
        assert merged["model.layers.0.mlp.up_proj.weight"].dtype == dtype
        assert list(merged) == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scalar", [False, True], ids=["causal", "scalar"])
def test_artifact_computes_what_training_computed(tmp_path: Path, tied: bool, scalar: bool) -> None:
    start = make_tiny_model(tmp_path / "start", seed=2, tied=tied)
    lm = adapted(start, frozen=1, scalar=scalar)
    ids = IDS if not scalar else torch.tensor([[5, 6, 7, 9]])
    expected = lm(ids).logits
    folder = save(lm, start, tmp_path / "saved")
    plain_names = set(load_file(start / "model.safetensors")) | ({"score.weight"} if scalar else set())
    assert set(load_file(folder / "model.safetensors")) == plain_names - ({"lm_head.weight"} if scalar else set())
    load = load_scalar_lm if scalar else load_causal_lm
    for quantization in (None, "nf4"):
        again = load(folder, num_frozen_layers=0, dtype=FP32, trainable=False, quantization=quantization)
        torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_stages_that_follow_each_other_keep_every_update(tmp_path: Path) -> None:
    """The third stage starts from exactly what the second has trained, although the update is smaller than a step of the 4 bits."""
    start = make_tiny_model(tmp_path / "start", seed=2)
    folder, base = start, quantized(start)(IDS).logits
    for number in (1, 2):
        lm = adapted(folder, frozen=1, seed=number)
        with adapters_enabled(lm, on=False):
            torch.testing.assert_close(lm(IDS).logits, base, rtol=1e-5, atol=1e-5)
        base = lm(IDS).logits
        folder = save(lm, start, tmp_path / str(number))
    stored = load_file(folder / "nf4" / "weights.safetensors")
    assert stored["1.mlp.up_proj.A"].shape[0] == 8  # both updates; layer 0 is frozen
    assert "0.mlp.up_proj.A" not in stored
    # The 4 bits are those of the start.
    plain = load_causal_lm(start, num_frozen_layers=0, dtype=FP32)
    assert torch.equal(stored["1.mlp.up_proj.nf4"], pack(plain.model.layers[1].mlp.up_proj.weight))


def test_adapter_folder_says_which_weights_it_belongs_to(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start", seed=2)
    first = adapted(start)
    save(first, start, tmp_path / "1")
    second = adapted(tmp_path / "1", seed=2)
    save(second, start, tmp_path / "2")
    said = [(tmp_path / number / "adapter" / "README.md").read_text() for number in ("1", "2")]
    assert ["quantized to NF4" in text for text in said] == [True, False]
    assert "as that artifact has them" in said[1]
    bases = [
        load_causal_lm(folder, num_frozen_layers=0, dtype=FP32, trainable=False) for folder in (start, tmp_path / "1")
    ]
    fresh = quantized(start)
    bases[0].load_state_dict(dict(merged_weights(fresh, fresh.named_parameters())), strict=False)
    for base, lm, number in zip(bases, (first, second), ("1", "2"), strict=True):
        found = PeftModel.from_pretrained(base, tmp_path / number / "adapter").eval()
        torch.testing.assert_close(found(IDS).logits, lm(IDS).logits, rtol=1e-5, atol=1e-5)


def test_bf16_artifact_is_reloaded_from_its_4_bits(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start", seed=2)
    lm = adapted(start, dtype=BF16)
    folder = save(lm, start, tmp_path / "saved", BF16)
    again = quantized(folder, dtype=BF16)
    merged = load_file(folder / "model.safetensors")
    for name, weight in merged_weights(again, again.named_parameters()):
        # Up to the order of the sum, which can round to another bf16.
        torch.testing.assert_close(weight, merged[name], rtol=2**-7, atol=2**-12)


def test_quantizing_merged_weights_again_would_lose_the_update(tmp_path: Path) -> None:
    """Why artifacts carry their 4-bit form."""
    base = unpack(pack(random_weight(256, 256, 1)), (256, 256), FP32)
    update = 0.003 * random_weight(256, 8, 2) @ random_weight(8, 256, 3) / 8**0.5
    again = unpack(pack(base + update), (256, 256), FP32)
    kept = ((again - base) * update).sum() / update.square().sum()
    assert kept < 0.1


def test_4_bit_form_of_other_weights_is_refused(tmp_path: Path) -> None:
    start = make_tiny_model(tmp_path / "start", seed=2)
    folder = save(adapted(start), start, tmp_path / "saved")
    file = folder / "nf4" / "weights.safetensors"
    stored = load_file(file)
    broken = {
        "other": stored | {"1.mlp.up_proj.nf4": stored["0.mlp.up_proj.nf4"].clone()},
        "short": stored | {"1.mlp.up_proj.nf4": stored["1.mlp.up_proj.nf4"][:-16]},
        "rank": stored | {"1.mlp.up_proj.A": stored["1.mlp.up_proj.A"][:1].clone()},
        "shape": stored | {"1.mlp.up_proj.A": stored["1.mlp.up_proj.A"][:, :-1].clone()},
        "dtype": stored | {"1.mlp.up_proj.A": stored["1.mlp.up_proj.A"].half()},
        "nan": stored | {"1.mlp.up_proj.A": stored["1.mlp.up_proj.A"] * float("nan")},
        "half": {name: value for name, value in stored.items() if name != "1.mlp.up_proj.A"},
        "missing": {name: value for name, value in stored.items() if name != "1.mlp.up_proj.nf4"},
    }
    for content in broken.values():
        save_file(content, file)
        with pytest.raises(InputError, match=r"does not belong to the weights beside it \(1.mlp.up_proj\)"):
            quantized(folder)
    file.write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="weights.safetensors cannot be read"):
        quantized(folder)


def test_model_without_linear_layers_is_refused() -> None:
    from tests.support.tiny_models import tiny_model

    with pytest.raises(InputError, match="GPT2LMHeadModel has no linear layers that could be kept in 4 bits"):
        quantize_layers(tiny_model("gpt2"), None, dtype=FP32)


def test_shared_weights_stay_as_they_are(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32, trainable=False)
    first, second = (lm.model.layers[i].mlp.up_proj for i in (0, 1))
    second.weight = first.weight
    quantize_layers(lm, None, dtype=FP32)
    assert type(lm.model.layers[0].mlp.up_proj) is type(lm.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(lm.model.layers[2].mlp.up_proj) is Nf4Linear


def test_copy_and_state_dict_of_a_quantized_model(tiny_model: Path) -> None:
    lm = quantized(tiny_model)
    twin = copy.deepcopy(lm)
    twin.load_state_dict(lm.state_dict())
    assert torch.equal(twin(IDS).logits, lm(IDS).logits)
    assert "model.layers.0.mlp.up_proj.nf4" in lm.state_dict()
    assert AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits.shape == lm(IDS).logits.shape
