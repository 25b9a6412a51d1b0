"""Every causal language model class of the installed transformers: exactly right, or refused by import_model in one sentence.

docs/models.md is the result. `UPDATE_DOCS=1 pytest tests/import_model/test_every_architecture.py` writes it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from components.import_model.conformance import (
    LENGTHS,
    _short_windows,
    check_conformance,
    fixed_logprobs,
    require_bf16,
    require_same_after_saving,
)
from components.rlhf.data.batching import TokenBatch, collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.layers import HEAD_NAME, decoder_of
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm, require_scalar_class
from components.rlhf.models.saving import save_model
from components.rlhf.models.scalar import ScalarModel
from components.rlhf.text.errors import InputError
from tests.support.tiny_model import make_tiny_tokenizer
from tests.support.tiny_models import CannotBuild, causal_lm_types, tiny_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/models.md"
FROZEN = 2
SCORE = torch.nn.functional.log_softmax


@dataclass(frozen=True, kw_only=True)
class Row:
    """One architecture, as docs/models.md shows it."""

    type: str
    name: str
    result: str  # yes, or why not
    frozen: str = ""
    bf16: str = ""
    reward_model: str = ""
    router_loss: str = ""

    def __str__(self) -> str:
        return f"| {self.type} | {self.name} | {self.result} | {self.frozen} | {self.bf16} | {self.reward_model} | {self.router_loss} |"


ROWS: dict[str, Row] = {}


def reason(error: InputError) -> str:
    """Why an architecture is refused, without its name and numbers, which depend on the random weights."""
    text = str(error)
    for pattern, short in (
        ("is not causal", "not causal"),
        ("that are sampled with a cache", "decoding with a cache differs from its forward pass"),
        (r"with 0 frozen layers differ", "padding changes its log-probs"),
        ("cannot be run", "needs other inputs than token ids"),
        ("No reward model can be made", "no reward model can be made of it"),
        ("does not survive saving", "cannot be loaded again after saving"),
        ("is not a model folder", "cannot be loaded again after saving"),
        ("has no num_hidden_layers", "needs other inputs than token ids"),
        ("in a list", "layers are not in one list"),
        ("frozen layers differ", "layers share more than hidden states"),
    ):
        if re.search(pattern, text):
            return short
    raise AssertionError(f"a refusal of a new kind: {text}")


def batch_of(vocab_size: int) -> TokenBatch:
    generator = torch.Generator().manual_seed(5)
    texts = [[torch.randint(vocab_size, (n,), generator=generator).tolist() for n in lengths] for lengths in LENGTHS]
    return collate([prompt for prompt, _ in texts], [response for _, response in texts])


def plain_logprobs(lm: Any, batch: TokenBatch) -> list[Tensor]:
    """Log-probs of each response, from one call of the model per text."""
    found = []
    for row, length in enumerate((batch.prompt_lengths + batch.response_lengths).tolist()):
        ids, start = batch.input_ids[row : row + 1, :length], int(batch.prompt_lengths[row])
        logits = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
        found.append(SCORE(logits.double(), -1)[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0])
    return found


def gap(logprobs: Tensor, expected: list[Tensor]) -> float:
    return max(float((logprobs[row, : len(one)] - one).abs().max()) for row, one in enumerate(expected))


def saved(lm: Any, folder: Path) -> Path:
    lm.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    save_model(lm, make_tiny_tokenizer(), folder, dtype=torch.float32)
    return folder


def accepted(lm: Any, folder: Path, frozen: int) -> None:
    """Import's checks: InputError or exact."""
    check_conformance(lm, num_frozen_layers=frozen)
    require_scalar_class(lm.config)
    before = fixed_logprobs(lm)
    require_same_after_saving(saved(lm, folder), before, torch.float32)


# Architectures of every kind of layers; all others are marked slow, so that make test takes minutes.
SAMPLE = (
    "deepseek_v3",
    "falcon",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mamba",
    "mixtral",
    "phi3",
    "qwen3_moe",
    "recurrent_gemma",
)
KINDS = [kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.slow) for kind in causal_lm_types()]


@pytest.mark.parametrize("kind", KINDS)
def test_architecture_is_exact_or_refused(kind: str, tmp_path: Path) -> None:
    try:
        lm: Any = tiny_model(kind)
    except CannotBuild as error:
        ROWS[kind] = Row(type=kind, name="", result=f"not tested: {str(error).splitlines()[0][:60]}")
        return
    name = type(lm).__name__
    try:
        accepted(lm, tmp_path / "model", 0)
    except InputError as error:
        ROWS[kind] = Row(type=kind, name=name, result=f"no: {reason(error)}")
        return
    batch = batch_of(lm.config.get_text_config().vocab_size)
    frozen_depths, frozen = [0], "yes"
    try:
        check_conformance(lm, num_frozen_layers=FROZEN)
        frozen_depths.append(FROZEN)
    except InputError as error:
        frozen = f"no: {reason(error)}"
    with torch.no_grad():
        expected = plain_logprobs(lm, batch)
        for depth in frozen_depths:
            actor = Actor(lm, num_frozen_layers=depth, dtype=torch.float32)
            logprobs, _ = actor(batch, SamplingDistribution(), actor.trunk(batch))
            assert gap(logprobs, expected) < 1e-3
        again = load_causal_lm(tmp_path / "model", num_frozen_layers=0, dtype=torch.float32, trainable=False)
        assert (
            gap(Actor(again, num_frozen_layers=0, dtype=torch.float32)(batch, SamplingDistribution())[0], expected)
            < 1e-3
        )
    ROWS[kind] = Row(
        type=kind,
        name=name,
        result="yes",
        frozen=frozen,
        bf16=bf16_of(tmp_path / "model"),
        reward_model=reward_model_of(tmp_path / "model", batch, frozen_depths),
        router_loss=router_loss_of(tmp_path / "model"),
    )


def reward_model_of(folder: Path, batch: TokenBatch, frozen_depths: list[int]) -> str:
    """Check the scalar model of an architecture: its scores are a linear function of the decoder's last states."""
    lm = load_scalar_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False, seed=3)
    own = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    head = getattr(lm, HEAD_NAME)
    with torch.no_grad():
        expected = [
            (head.weight[0] @ last_state(own, batch.input_ids[row : row + 1, :length]))
            for row, length in enumerate((batch.last_positions() + 1).tolist())
        ]
        for depth in frozen_depths:
            model = ScalarModel(lm, num_frozen_layers=depth, dtype=torch.float32)
            assert torch.allclose(model.scores(batch), torch.stack(expected), atol=1e-4), depth
    return "of transformers" if hasattr(transformers, type(lm).__name__) else "generic"


def last_state(lm: Any, ids: Tensor) -> Tensor:
    """The decoder's state at the last token, recorded in the model's own forward pass."""
    outputs: list[Tensor] = []
    handle = decoder_of(lm).register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
    lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    handle.remove()
    return outputs[-1][0, -1]


def bf16_of(folder: Path) -> str:
    """Whether training and sampling in bf16 work."""
    try:
        require_bf16(load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32))
    except InputError:
        return "no"
    return "yes"


def router_loss_of(folder: Path) -> str:
    """Check that the auxiliary loss is what transformers adds to its own loss."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    batch = collate([row[:1] for row in ids.tolist()], [row[1:] for row in ids.tolist()])
    plain = lm(input_ids=ids, labels=ids, use_cache=False).loss
    try:
        theirs = lm(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True).loss - plain
    except (TypeError, ValueError):  # no such argument
        theirs = torch.zeros(())
    actor = Actor(lm, num_frozen_layers=0, dtype=torch.float32)
    actor(batch, SamplingDistribution())
    ours = 0.0 if actor.router_loss is None else float(actor.router_loss)
    assert ours == pytest.approx(float(theirs), abs=1e-5)
    return "yes" if ours else ""


def test_every_kind_of_attention_is_tested_beyond_its_window() -> None:
    """The texts of the check are longer than the windows that it sets."""
    lm = tiny_model("mistral")
    lm.config.sliding_window = 4096
    with _short_windows(lm.config):
        assert max(sum(lengths) for lengths in LENGTHS) > 3 * lm.config.sliding_window
    assert lm.config.sliding_window == 4096


def test_page_of_architectures_is_up_to_date() -> None:
    is_complete = set(ROWS) == set(causal_lm_types())
    if os.environ.get("UPDATE_DOCS"):
        assert is_complete, "run the whole file"
        PAGE.write_text(as_page(), encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    command = "UPDATE_DOCS=1 pytest tests/import_model/test_every_architecture.py"
    assert set(re.findall(r"^\| ([\w.-]+) \|", text, flags=re.MULTILINE)) - {"model_type", "---"} == set(
        causal_lm_types()
    )
    assert [str(row) for row in ROWS.values() if str(row) not in text.splitlines()] == [], f"run {command}"
    if is_complete:
        assert text == as_page(), f"run {command}"


def as_page() -> str:
    rows = sorted(ROWS.values(), key=lambda row: row.type)
    exact = [row for row in rows if row.result == "yes"]
    frozen = [row for row in exact if row.frozen == "yes"]
    return f"""# Architectures

Written by `tests/import_model/test_every_architecture.py`, which builds a tiny random model of every causal language model class of
transformers {transformers.__version__}: {len(exact)} of {len(rows)} are exact, {len(frozen)} of them also with frozen layers;
`import_model` refuses the others before data is prepared. It checks the model of a run in the same way, with its own weights;
`kfp-rlhf check-model PATH` runs only that check.

Exact means that these equal the model's own forward pass on single texts, in fp32, up to rounding: log-probs of padded batches longer
than the attention windows, with and without frozen layers; responses sampled with a cache, two of them to one prompt, while other
rows stop; the exported model; scores of a reward model of this architecture. *Reward model* says which class it has: of
transformers, or a generic one, which `AutoModelForSequenceClassification` loads only after
`components.rlhf.models.loading.register_scalar_class`. *bf16* says whether training and sampling in bf16 work; otherwise set
`model.precision` to fp32. *Router loss* says that the auxiliary loss of a mixture of experts is added, as transformers adds it with
`output_router_logits`.

| model_type | class | exact | frozen layers | bf16 | reward model | router loss |
|---|---|---|---|---|---|---|
""" + "".join(f"{row}\n" for row in rows)
