import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import (
    load_causal_lm,
    load_reference_lm,
    load_scalar_lm,
    load_stop_ids,
    reward_normalization,
    trainable_parameters,
)
from components.rlhf.models.saving import save_model
from components.rlhf.text.errors import InputError
from tests.support.small_models import actor_of, batch, scalar_of, trained_names
from tests.support.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
IDS = torch.tensor([[5, 6, 7, 0, 9, 10]])
FP32, BF16 = torch.float32, torch.bfloat16


def gradient_step(loss: torch.Tensor, module: torch.nn.Module) -> None:
    """One SGD step, so that the saved weights differ from the loaded ones."""
    loss.backward()
    with torch.no_grad():
        for parameter in trainable_parameters(module):
            parameter -= 0.05 * parameter.grad  # type: ignore[operator]


def edit_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content |= changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [0, 2])
def test_trained_actor_loads_with_from_pretrained(tmp_path: Path, tied: bool, frozen: int) -> None:
    folder = make_tiny_model(tmp_path / "start", seed=2, tied=tied)
    actor = actor_of(folder, frozen=frozen)
    gradient_step(-actor(batch(), SamplingDistribution())[0].mean(), actor)
    logits = actor.lm(IDS).logits
    save_model(actor.lm, AutoTokenizer.from_pretrained(folder), tmp_path / "saved", dtype=FP32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(loaded(IDS).logits, logits)
    assert not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(IDS).logits, logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.eos_token_id == 0


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_model_rounds_to_dtype(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "start", seed=2, tied=tied)
    lm = load_causal_lm(folder, num_frozen_layers=1, dtype=BF16)
    save_model(lm, AutoTokenizer.from_pretrained(folder), tmp_path / "saved", dtype=BF16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
    assert loaded.dtype == BF16
    assert {weight.dtype for weight in load_file(tmp_path / "saved" / "model.safetensors").values()} == {BF16}
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, start[name].to(BF16)), name


def test_trained_reward_model_loads_with_from_pretrained(tiny_model: Path, tmp_path: Path) -> None:
    model = scalar_of(tiny_model, frozen=1)
    gradient_step(-model.scores(batch()).mean(), model)
    model.lm.config.reward_mean, model.lm.config.reward_std = 0.25, 2.0
    save_model(model.lm, AutoTokenizer.from_pretrained(tiny_model), tmp_path / "saved", dtype=FP32)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert loaded.num_labels == 1
    ids = torch.tensor([[5, 6, 7, 9, 10]])
    assert torch.equal(loaded(ids).logits, model.lm(ids).logits)
    assert reward_normalization(tmp_path / "saved") == (0.25, 2.0)
    reloaded = load_scalar_lm(tmp_path / "saved", num_frozen_layers=1, dtype=FP32)
    assert torch.equal(reloaded.score.weight, model.lm.score.weight)


def test_saved_folder_has_the_tokenizer_and_is_world_readable(tiny_model: Path, tmp_path: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    save_model(lm, tokenizer, tmp_path / "saved", dtype=FP32)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded("a film")["input_ids"] == tokenizer("a film")["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
    for file in (tmp_path / "saved").iterdir():
        assert file.stat().st_mode & 0o044 == 0o044, file.name


def test_frozen_parts_have_dtype_and_trainable_ones_fp32(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=2, dtype=BF16)
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    for name, parameter in lm.named_parameters():
        assert parameter.dtype == (BF16 if name.startswith(frozen) else FP32), name


def test_model_that_is_not_trainable_has_dtype(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=1, dtype=BF16, trainable=False)
    assert not trained_names(lm)
    assert {p.dtype for p in lm.parameters()} == {BF16}


def test_dropout_is_off(tiny_model: Path, tmp_path: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=FP32)
    lm.config.attention_dropout = 0.5
    lm.save_pretrained(tmp_path)
    reloaded = load_causal_lm(tmp_path, num_frozen_layers=0, dtype=FP32)
    assert not reloaded.training
    assert torch.equal(reloaded(IDS).logits, reloaded(IDS).logits)


@pytest.mark.parametrize("frozen", [3, 7])
def test_freezing_all_layers_is_rejected(tiny_model: Path, frozen: int) -> None:
    with pytest.raises(InputError, match=f"num_frozen_layers is {frozen}, but the model has 3 layers"):
        load_causal_lm(tiny_model, num_frozen_layers=frozen, dtype=FP32)


def test_new_head_is_normal_with_std_1_over_hidden_size_plus_1(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "wide", seed=0, num_layers=1, hidden_size=2048)
    weight = load_scalar_lm(folder, num_frozen_layers=0, dtype=FP32, seed=5).score.weight
    scaled = weight.detach().flatten() * (2048 + 1)
    assert weight.shape == (1, 2048)
    assert scaled.std().item() == pytest.approx(1, abs=4 / math.sqrt(2 * 2048))
    assert scaled.mean().item() == pytest.approx(0, abs=4 / math.sqrt(2048))
    assert (scaled.abs() < 1).float().mean().item() == pytest.approx(0.6827, abs=0.04)


def test_new_head_depends_only_on_seed(tiny_model: Path) -> None:
    def head(seed: int, global_seed: int) -> torch.Tensor:
        torch.manual_seed(global_seed)
        return load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=FP32, seed=seed).score.weight.detach()

    assert torch.equal(head(1, global_seed=0), head(1, global_seed=99))
    assert not torch.equal(head(1, global_seed=0), head(2, global_seed=0))


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError, match="is not a model folder that transformers can load"):
            load_causal_lm(folder, num_frozen_layers=0, dtype=FP32)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=0)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks the weights model\.layers\.1\.mlp\.up_proj\.weight"):
        load_causal_lm(folder, num_frozen_layers=0, dtype=FP32)


def test_truncated_weights_file_is_rejected(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=0)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(InputError, match="is not a model folder that transformers can load"):
        load_causal_lm(folder, num_frozen_layers=0, dtype=FP32)


def test_weights_of_another_shape_are_rejected(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=0)
    edit_json(folder / "config.json", intermediate_size=80)
    with pytest.raises(InputError, match="is not a model folder that transformers can load"):
        load_causal_lm(folder, num_frozen_layers=0, dtype=FP32)


def test_reward_model_without_a_head_is_rejected(tiny_model: Path) -> None:
    with pytest.raises(InputError, match=r"lacks the weights score\.weight"):
        load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=FP32)


@pytest.mark.parametrize("missing", ["reward_mean", "reward_std"])
def test_reward_model_without_normalization_is_rejected(tmp_path: Path, missing: str) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=0)
    edit_json(folder / "config.json", **({"reward_mean": 0.5, "reward_std": 2.0} | {missing: None}))
    with pytest.raises(InputError, match="lacks reward_mean and reward_std"):
        reward_normalization(folder)


def folder_with_eos_ids(tmp_path: Path, *, generation: Any, config: Any) -> Path:
    """A model folder with these eos_token_id values; generation "absent" removes generation_config.json."""
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=config)
    if generation == "absent":
        (tmp_path / "generation_config.json").unlink()
    else:
        edit_json(tmp_path / "generation_config.json", eos_token_id=generation)
    return tmp_path


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (2, 3, (2,)),
        ([2, 5], 3, (2, 5)),
        ("absent", 3, (3,)),
        ("absent", [3, 4], (3, 4)),
        (None, 3, (3,)),
    ],
)
def test_stop_ids_come_from_generation_config_then_config(
    tmp_path: Path, generation: Any, config: Any, expected: tuple[int, ...]
) -> None:
    assert load_stop_ids(folder_with_eos_ids(tmp_path, generation=generation, config=config)) == expected


def test_missing_stop_ids_are_rejected(tmp_path: Path) -> None:
    folder = folder_with_eos_ids(tmp_path, generation=None, config=None)
    edit_json(folder / "config.json", eos_token_id=None)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"eos_token_id": None}))
    with pytest.raises(InputError, match="no eos_token_id"):
        load_stop_ids(folder)


def test_save_model_does_not_import_deepspeed(tiny_model: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.saving import save_model
folder = Path(sys.argv[1])
model = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)
save_model(model, load_tokenizer(folder), Path(sys.argv[2]), dtype=torch.float32)
print("deepspeed" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tiny_model), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_non_finite_weights_are_not_saved(tiny_model: Path, tmp_path: Path) -> None:
    model = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match="are not finite after the last step"):
        save_model(model, load_tokenizer(tiny_model), tmp_path, dtype=torch.float32)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_reference_has_the_same_output_under_autocast(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path, seed=4, tied=tied)
    whole = actor_of(folder, dtype=BF16)
    halved = Actor(load_reference_lm(folder, num_frozen_layers=0, dtype=BF16), num_frozen_layers=0, dtype=BF16)
    for distribution in (SamplingDistribution(), SamplingDistribution(temperature=0.7)):
        for ours, theirs in zip(
            *(actor(batch(), distribution, with_entropy=True) for actor in (halved, whole)), strict=True
        ):
            assert torch.equal(ours, theirs)
    kept = {"lm.model.embed_tokens.weight"} | {name for name, p in halved.named_parameters() if p.ndim == 1}
    assert {p.dtype for name, p in halved.named_parameters() if name not in kept} == {BF16}
    assert {p.dtype for name, p in halved.named_parameters() if name in kept} == {FP32}
    assert (halved.lm.lm_head.weight is halved.lm.model.embed_tokens.weight) == tied
