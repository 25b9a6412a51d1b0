"""Model folders that are written one weight at a time, against those of transformers."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models import saving
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.models.saving import save_model
from components.rlhf.models.stored import StoredForm
from components.rlhf.models.weight_files import INDEX, WeightFiles
from components.rlhf.text.errors import InputError
from tests.support.sharded_loading import make_random_model
from tests.support.tiny_model import make_tiny_tokenizer

FP32, BF16 = torch.float32, torch.bfloat16
# Tied heads, biases, heads that come before the embeddings, and weights that are renamed, split or fused when they are loaded.
TYPES = (
    "llama", "gpt2", "camembert", "deepseek_v3", "ernie4_5_moe", "gpt_neox", "gpt_oss", "granitemoe", "hrm_text", "jamba", "jetmoe",
    "mamba2", "mixtral", "phimoe", "qwen3_moe", "xlstm",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def model_of(folders: Path, kind: str, dtype: torch.dtype = FP32) -> Any:
    """A loaded model of an architecture, whose folder also has a tokenizer."""
    if not (folders / kind).is_dir():
        make_random_model(kind, folders / kind)
        make_tiny_tokenizer().save_pretrained(folders / kind)
    return load_causal_lm(folders / kind, num_frozen_layers=0, dtype=dtype, trained_dtype=dtype)


def overwritten(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """As an engine's stream: each weight is whole only until the next one is asked for."""
    for name, parameter in lm.named_parameters():
        weight = parameter.detach().clone()
        yield f"lm.{name}", weight
        weight.fill_(float("nan"))


@pytest.mark.parametrize("kind", TYPES)
def test_folder_is_that_of_transformers(folders: Path, tmp_path: Path, kind: str) -> None:
    lm = model_of(folders, kind)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.01
    lm.save_pretrained(tmp_path / "theirs")
    tokenizer = load_tokenizer(folders / kind)
    save_model(lm, tokenizer, tmp_path / "ours", dtype=FP32, weights=overwritten(lm))
    for file in (tmp_path / "theirs").iterdir():
        assert file.read_bytes() == (tmp_path / "ours" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", ["llama", "mixtral", "hrm_text", "deepseek_v3"])
def test_weights_are_split_into_files_with_an_index(folders: Path, tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    lm, limit = model_of(folders, kind), 60_000
    monkeypatch.setattr(saving, "WeightFiles", lambda *args: WeightFiles(*args, max_file=limit))
    save_model(lm, load_tokenizer(folders / kind), tmp_path, dtype=FP32, weights=overwritten(lm))
    files = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert len(files) > 3 and "model.safetensors" not in files
    for weights in files.values():
        assert len(weights) == 1 or sum(weight.nbytes for weight in weights.values()) <= limit
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, weights in files.items() for name in weights}
    sizes = [weight.nbytes for weights in files.values() for weight in weights.values()]
    assert index["metadata"] == {"total_parameters": sum(sizes) // 4, "total_size": sum(sizes)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == lm.state_dict().keys()
    for name, weight in lm.state_dict().items():
        assert torch.equal(loaded[name], weight), name


def test_stored_buffers_are_exported_in_their_own_precision(folders: Path, tmp_path: Path) -> None:
    """The bias that routes tokens to experts is a buffer, which no engine streams; in bf16 it would route them differently."""
    lm = model_of(folders, "deepseek_v3", BF16)
    save_model(lm, load_tokenizer(folders / "deepseek_v3"), tmp_path, dtype=BF16, weights=overwritten(lm))
    weights = load_file(tmp_path / "model.safetensors")
    biases = {name for name in weights if name.endswith("e_score_correction_bias")}
    assert biases
    for name, weight in weights.items():
        assert weight.dtype == (FP32 if name in biases else BF16), name
    stored = load_file(folders / "deepseek_v3" / "model.safetensors")
    assert all(torch.equal(weights[name], stored[name]) for name in biases)
    assert all(stored[name].std() > 0 for name in biases)


def test_config_names_the_precision_of_the_weights(folders: Path, tmp_path: Path) -> None:
    lm = model_of(folders, "llama")  # trained in fp32, computed in bf16
    save_model(lm, load_tokenizer(folders / "llama"), tmp_path, dtype=BF16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {weight.dtype for weight in load_file(tmp_path / "model.safetensors").values()} == {BF16}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_after_the_whole_stream(
    folders: Path, tmp_path: Path, bad: float
) -> None:
    """After it, because other ranks wait for the rank that writes."""
    lm = model_of(folders, "llama")
    names = [name for name, _ in lm.named_parameters()]
    with torch.no_grad():
        for name in (names[1], names[4]):
            lm.get_parameter(name).view(-1)[-1] = bad
    seen = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, weight in overwritten(lm):
            seen.append(name)
            yield name, weight

    with pytest.raises(InputError, match=f"The weights {names[1]}, {names[4]} are not finite after the last step"):
        save_model(lm, load_tokenizer(folders / "llama"), tmp_path, dtype=FP32, weights=stream())
    assert seen == [f"lm.{name}" for name in names]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_a_weight_is_missing_or_differs(folders: Path, tmp_path: Path) -> None:
    lm = model_of(folders, "llama")
    weights = list(lm.named_parameters())
    for wrong, message in (
        (weights[:-1], "no value for"),
        ([(name, weight[:-1]) for name, weight in weights], "expected"),
    ):
        with pytest.raises(ValueError, match=message):
            save_model(lm, load_tokenizer(folders / "llama"), tmp_path, dtype=FP32, weights=iter(wrong))
        assert list(tmp_path.iterdir()) == []


def test_fused_weights_wait_for_all_of_their_parts(folders: Path) -> None:
    """hrm_text stores gate, q, k and v of a layer as one matrix; a missing part is an error, not a matrix without it."""
    lm = model_of(folders, "hrm_text")
    named = list(lm.named_parameters())
    form = StoredForm(lm, [name for name, _ in named])
    stored = dict(form.convert(named))
    attention = [name for name in stored if name.endswith("gqkv_proj.weight")]
    mlp = [name for name in stored if name.endswith("mlp.gate_up_proj.weight")]
    assert len(attention) > 1 and len(stored) == len(named) - 3 * len(attention) - len(mlp)
    without = [pair for pair in named if "layers.1" not in pair[0] or "k_proj" not in pair[0]]
    assert len(without) < len(named)
    with pytest.raises(ValueError, match="weights are missing"):
        list(form.convert(without))
