"""Loads and exports every architecture under ZeRO-3 in one process: `python -m tests.support.sharded_loading OUT`.

OUT becomes a JSON object: for each model type "" or what is wrong. "not built" is for types of which there is no tiny model.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.engine.deepspeed import gathered
from components.rlhf.engine.factory import weight_shards
from components.rlhf.engine.group import SINGLE_PROCESS
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.text.errors import InputError
from tests.support.engine_cases import training_of
from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.tiny_models import CannotBuild, causal_lm_types, tiny_config

IN_BF16 = ("llama", "gpt2", "mixtral", "deepseek_v3", "gemma2", "qwen3_moe", "mamba2")
NOT_BUILT = "not built"


def main(out: Path) -> None:
    tokenizer = make_tiny_tokenizer()
    found = {}
    for kind in causal_lm_types():
        with tempfile.TemporaryDirectory() as folder:
            try:
                make_random_model(kind, Path(folder) / "model")
                tokenizer.save_pretrained(Path(folder) / "model")
            except Exception:  # as in tests of tiny models: some types cannot be built from their config
                found[kind] = NOT_BUILT
                continue
            try:
                for dtype in [torch.float32] + [torch.bfloat16] * (kind in IN_BF16):
                    check(Path(folder) / "model", Path(folder) / str(dtype), dtype)
                found[kind] = ""
            except Exception as error:
                found[kind] = f"{type(error).__name__}: {error}"
    out.write_text(json.dumps(found))


def make_random_model(kind: str, folder: Path) -> None:
    """A folder with the weights of the class's own initialization, and every buffer that it stores changed."""
    config: Any = tiny_config(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > 5_000_000:
        raise CannotBuild(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    stored = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in stored and buffer.is_floating_point():
            buffer.uniform_(0.1, 0.9)
    model.save_pretrained(folder)


def check(model: Path, out: Path, dtype: torch.dtype) -> None:
    """Raise AssertionError unless a sharded model equals a whole one, also when exported, and errors are the same."""
    shard = weight_shards(training_of("deepspeed", zero_stage=3), group=SINGLE_PROCESS, dtype=dtype)
    options: dict[str, Any] = dict(num_frozen_layers=0, dtype=dtype, trained_dtype=dtype)
    exported = []
    for load, more in ((load_scalar_lm, {"seed": 3}), (load_causal_lm, {})):
        outcomes: list[Any] = []
        for own in ({}, {"shard": shard}):
            try:
                outcomes.append(load(model, **options, **more, **own))
            except InputError as error:
                outcomes.append(str(error))
        whole, lm = outcomes
        if isinstance(whole, str):
            assert lm == whole
            continue
        require_equal(whole, lm)
        assert not lm.training
        exported = outcomes
    for number, trained in enumerate(exported):  # the causal language models
        save_model(trained, load_tokenizer(model), out / str(number), dtype=dtype, weights=stream(trained))
    if exported:
        assert files_of(out / "0") == files_of(out / "1"), "exports differ"


def stream(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As DeepSpeedEngine.full_weights()."""
    for name, parameter in lm.named_parameters():
        with gathered(parameter):
            yield f"lm.{name}", parameter.detach()


def require_equal(whole: nn.Module, lm: nn.Module) -> None:
    ours, theirs = (dict(model.named_parameters(remove_duplicate=False)) for model in (lm, whole))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert hasattr(parameter, "ds_id") and parameter.numel() == 0, f"{name} is whole"
        with gathered(parameter):
            assert parameter.dtype == theirs[name].dtype and torch.equal(parameter, theirs[name]), name
        tied = [{other for other, p in named.items() if p is named[name]} for named in (ours, theirs)]
        assert tied[0] == tied[1], f"{name} is tied differently"
    buffers, expected = dict(lm.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype and torch.equal(buffer, expected[name]), name


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
