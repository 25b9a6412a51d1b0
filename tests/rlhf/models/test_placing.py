"""Where weights go while a model is loaded."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import core_model_loading

from components.rlhf.models.loading import load_causal_lm, load_reference_lm, load_scalar_lm
from components.rlhf.models.placing import NO_THREADS, Placement
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_model

FP32, BF16 = torch.float32, torch.bfloat16


class Recorder:
    """A shard of a single rank, which keeps the whole weight elsewhere. Implements Shard."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.live: list[int] = []  # values of whole weights in the model, each time a weight is given

    def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        if hasattr(parameter, "recorded"):
            return
        self.weights.append(parameter.data.to(dtype, copy=True))
        parameter.data = torch.empty(0, dtype=dtype)
        parameter.recorded = len(self.weights) - 1  # type: ignore[attr-defined]

    def equal(self, first: Any, second: Any) -> bool:
        return torch.equal(self.weights[first.recorded], self.weights[second.recorded])

    def whole(self, parameter: Any) -> torch.Tensor:
        return self.weights[parameter.recorded]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("seed", [None, 3], ids=["causal", "scalar"])
def test_every_weight_is_sharded_once_and_is_that_of_a_whole_model(
    tmp_path: Path, tied: bool, seed: int | None
) -> None:
    folder = make_tiny_model(tmp_path, seed=2, tied=tied)
    options: dict[str, Any] = dict(num_frozen_layers=0, dtype=BF16, trained_dtype=BF16)
    load: Any = load_causal_lm if seed is None else load_scalar_lm
    options |= {} if seed is None else {"seed": seed}
    shard = Recorder()
    whole, lm = load(folder, **options), load(folder, **options, shard=shard)
    named = dict(lm.named_parameters())
    assert len(shard.weights) == len(named) == len(dict(whole.named_parameters()))
    for name, weight in whole.named_parameters():
        assert named[name].numel() == 0
        assert torch.equal(shard.whole(named[name]), weight), name
    for (name, buffer), (other, expected) in zip(lm.named_buffers(), whole.named_buffers(), strict=True):
        assert name == other and not buffer.is_meta and torch.equal(buffer, expected)


def test_one_weight_is_whole_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, models, whole = make_tiny_model(tmp_path, seed=2), [], []
    original = core_model_loading.set_param_for_module

    def noting(model: Any, *args: Any) -> None:
        models[:] = [model]
        original(model, *args)

    class Counting(Recorder):
        def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
            whole.append(sum(p.numel() > 0 and not p.is_meta for p in models[0].parameters()) if models else 0)
            super().__call__(parameter, dtype)

    monkeypatch.setattr(core_model_loading, "set_param_for_module", noting)
    load_causal_lm(folder, num_frozen_layers=0, dtype=BF16, trainable=False, shard=Counting())
    assert len(whole) > 20 and set(whole[: len(whole) // 2]) == {1}


@pytest.mark.parametrize(
    ("frozen", "trainable", "trained", "expected"),
    [
        (0, True, FP32, {FP32}),
        (2, True, FP32, {FP32, BF16}),
        (2, True, BF16, {BF16}),
        (0, False, FP32, {BF16}),
    ],
)
def test_weights_get_their_final_precision_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    frozen: int,
    trainable: bool,
    trained: torch.dtype,
    expected: set[torch.dtype],
) -> None:
    dtypes: dict[int, set[torch.dtype]] = {}
    place = Placement._place

    def noting(self: Placement, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        place(self, parameter, dtype)
        dtypes.setdefault(id(parameter), set()).add(parameter.dtype)

    monkeypatch.setattr(Placement, "_place", noting)
    folder = make_tiny_model(tmp_path, seed=2, tied=False)
    lm = load_causal_lm(folder, num_frozen_layers=frozen, dtype=BF16, trainable=trainable, trained_dtype=trained)
    assert {p.dtype for p in lm.parameters()} == expected
    assert all(dtypes[id(p)] == {p.dtype} for p in lm.parameters())  # never another one before


def test_errors_of_placing_are_not_blamed_on_the_folder(tiny_model: Path) -> None:
    class OutOfMemory(Recorder):
        def __call__(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
            raise MemoryError("no memory")

    before = core_model_loading.set_param_for_module
    with pytest.raises(MemoryError, match="no memory"):
        load_causal_lm(tiny_model, num_frozen_layers=0, dtype=BF16, shard=OutOfMemory())
    assert core_model_loading.set_param_for_module is before
    assert NO_THREADS not in os.environ


def test_errors_of_the_folder_are_the_same_when_it_is_sharded(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", seed=0)
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop("model.layers.1.mlp.up_proj.weight")
    for changed in (weights, weights | {"model.layers.1.mlp.up_proj.weight": removed[:-1]}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        messages = set()
        for shard in (None, Recorder()):
            with pytest.raises(InputError) as error:
                load_causal_lm(folder, num_frozen_layers=0, dtype=BF16, shard=shard)
            messages.add(str(error.value))
        assert len(messages) == 1, messages


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("is_sharded", [True, False])
def test_stored_head_is_tied_only_if_it_equals_the_embeddings(tmp_path: Path, equal: bool, is_sharded: bool) -> None:
    """config.json says that the head is tied, and the folder has both. With frozen embeddings only the head is trained, in fp32."""
    folder = make_tiny_model(tmp_path, seed=2, tied=True)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (0 if equal else 1e-4)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shard = Recorder() if is_sharded else None
    lm = load_causal_lm(
        folder, num_frozen_layers=0 if is_sharded else 1, dtype=FP32 if is_sharded else BF16, shard=shard
    )
    assert (lm.lm_head.weight is lm.model.embed_tokens.weight) == equal
    if not equal:
        head = lm.lm_head.weight if shard is None else shard.whole(lm.lm_head.weight)
        assert head.dtype == FP32 and torch.equal(head, weights["lm_head.weight"])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_reference_keeps_what_autocast_does_not_round(tmp_path: Path, tied: bool, frozen: int) -> None:
    folder = make_tiny_model(tmp_path, seed=4, tied=tied)
    trained = load_causal_lm(folder, num_frozen_layers=frozen, dtype=BF16)
    reference = load_reference_lm(folder, num_frozen_layers=frozen, dtype=BF16)
    linear = {f"{name}.weight" for name, module in reference.named_modules() if isinstance(module, nn.Linear)}
    for (name, ours), (_, theirs) in zip(reference.named_parameters(), trained.named_parameters(), strict=True):
        rounded = name in linear and ours is not reference.model.embed_tokens.weight
        assert ours.dtype == (BF16 if rounded else theirs.dtype), name
        assert torch.equal(ours, theirs.to(ours.dtype))
        assert not ours.requires_grad
