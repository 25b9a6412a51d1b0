from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from components.rlhf.data.batching import collate
from components.rlhf.models.loading import load_scalar_lm
from components.rlhf.models.scalar import ScalarModel, before_actions
from tests.support.small_models import PROMPTS, RESPONSES, batch, rows_of, scalar_of, trained_names

LENGTHS = [len(response) for response in RESPONSES]


def scores_after_each_token(model: ScalarModel, prompt: list[int], response: list[int]) -> list[float]:
    """Raw scores of the prompt and of the text after each response token, one unpadded text at a time."""
    lm = model.lm
    found = []
    for length in range(len(response) + 1):
        ids = torch.tensor([prompt + response[:length]])
        hidden = lm.model(ids).last_hidden_state[0, -1]
        found.append((hidden @ lm.score.weight[0]).item())
    return found


def test_scores_equal_plain_transformers(tiny_model: Path) -> None:
    """Without padding, transformers also takes the score of the last token."""
    model = scalar_of(tiny_model)
    scores = model.scores(batch())
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        model.lm.config.pad_token_id = 256  # otherwise transformers takes the final EOS for padding
        logits = model.lm(torch.tensor([prompt + response])).logits
        assert scores[row].item() == pytest.approx(logits.item(), abs=1e-5)


def test_value_is_that_of_the_state_before_its_token(tiny_model: Path) -> None:
    model = scalar_of(tiny_model)
    for got, prompt, response in zip(rows_of(model(batch()), LENGTHS), PROMPTS, RESPONSES, strict=True):
        assert got == pytest.approx(scores_after_each_token(model, prompt, response)[:-1], abs=1e-5)


def test_prefix_score_is_that_of_the_text_up_to_its_token(tiny_model: Path) -> None:
    model = scalar_of(tiny_model)
    prefixes = model.prefix_scores(batch())
    for got, prompt, response in zip(rows_of(prefixes, LENGTHS), PROMPTS, RESPONSES, strict=True):
        assert got == pytest.approx(scores_after_each_token(model, prompt, response)[1:], abs=1e-5)
    last = prefixes[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1]
    assert torch.equal(last, model.scores(batch()))


def test_padding_is_zero(tiny_model: Path) -> None:
    model, mask = scalar_of(tiny_model, mean=2.0), batch().response_mask
    assert not model(batch())[~mask].any()
    assert not model.prefix_scores(batch())[~mask].any()


def test_values_equal_openrlhf_slices_of_left_padded_rows(tiny_model: Path) -> None:
    """`[:, :-1]` and then `[:, -num_actions:]` of rows `left padding | prompt | response | right padding`."""
    model, num_actions = scalar_of(tiny_model), max(LENGTHS)
    width = max(len(prompt) for prompt in PROMPTS)
    ids = torch.zeros(len(PROMPTS), width + num_actions, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        text = slice(width - len(prompt), width + len(response))
        ids[row, text], mask[row, text] = torch.tensor(prompt + response), 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = model.lm.model(ids, attention_mask=mask, position_ids=positions).last_hidden_state
    values = (hidden @ model.lm.score.weight[0])[:, :-1][:, -num_actions:]
    response_mask = batch().response_mask
    assert torch.allclose(model(batch())[response_mask], values[response_mask], atol=1e-5)


def all_scores(model: ScalarModel, prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
    rows = collate(prompts, responses)
    lengths = [len(response) for response in responses]
    values, prefixes = rows_of(model(rows), lengths), rows_of(model.prefix_scores(rows), lengths)
    return [[s, *v, *p] for s, v, p in zip(model.scores(rows).tolist(), values, prefixes, strict=True)]


REBATCHED: dict[str, Callable[[ScalarModel], list[list[float]]]] = {
    "more padding": lambda model: all_scores(model, [*PROMPTS, [1] * 30], [*RESPONSES, [2] * 30])[:4],
    "alone": lambda model: [all_scores(model, [p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)],
    "reversed": lambda model: all_scores(model, PROMPTS[::-1], RESPONSES[::-1])[::-1],
}


@pytest.mark.parametrize("rebatched", REBATCHED.values(), ids=REBATCHED.keys())
def test_scores_and_values_do_not_depend_on_the_rest_of_the_batch(
    tiny_model: Path, rebatched: Callable[[ScalarModel], list[list[float]]]
) -> None:
    model = scalar_of(tiny_model)
    for got, expected in zip(rebatched(model), all_scores(model, PROMPTS, RESPONSES), strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


def test_states_of_an_equal_trunk_give_the_same_numbers(tiny_model: Path) -> None:
    plain, model = scalar_of(tiny_model), scalar_of(tiny_model, frozen=2)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    states = lm(batch().input_ids, output_hidden_states=True).hidden_states[2].detach()
    assert torch.equal(model(batch()), plain(batch()))
    assert torch.equal(model(batch(), states), plain(batch()))
    assert torch.equal(model.scores(batch(), states), plain.scores(batch()))
    assert torch.equal(model.features(batch(), states), plain.features(batch()))


def test_frozen_layers_are_not_trained(tiny_model: Path) -> None:
    names = trained_names(scalar_of(tiny_model, frozen=2))
    assert "lm.score.weight" in names
    assert all(name.startswith(("lm.score.", "lm.model.layers.2.", "lm.model.norm.")) for name in names)


@pytest.mark.parametrize("frozen", [0, 1])
def test_trains_head_trains_only_the_head(tiny_model: Path, frozen: int) -> None:
    model = scalar_of(tiny_model, frozen=frozen, trains="head")
    assert trained_names(model) == {"lm.score.weight"}
    features = model.features(batch())
    assert not features.requires_grad
    values = model(batch(), action_features=before_actions(batch(), features))
    assert torch.equal(values, scalar_of(tiny_model)(batch()))
    values.sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"lm.score.weight"}


def test_scores_are_normalized_once(tiny_model: Path) -> None:
    raw = scalar_of(tiny_model).scores(batch())
    normalized = scalar_of(tiny_model, mean=1.5, std=4.0).scores(batch())
    assert torch.allclose(normalized, (raw - 1.5) / 4, atol=1e-6)


def test_values_and_prefix_scores_are_normalized_like_scores(tiny_model: Path) -> None:
    raw, model = scalar_of(tiny_model), scalar_of(tiny_model, mean=1.5, std=4.0)
    mask = batch().response_mask
    for got, expected in (
        (model(batch()), raw(batch())),
        (model.prefix_scores(batch()), raw.prefix_scores(batch())),
    ):
        assert torch.allclose(got[mask], (expected[mask] - 1.5) / 4, atol=1e-6)


def test_head_is_applied_in_fp32_under_autocast(tiny_model: Path) -> None:
    lm = load_scalar_lm(tiny_model, num_frozen_layers=1, dtype=torch.bfloat16, seed=0)
    model = ScalarModel(lm, num_frozen_layers=1, dtype=torch.bfloat16)
    with torch.no_grad():
        lm.score.weight.fill_(1 / 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # where 1 + 2^-12 rounds to 1
        assert model.apply_head(torch.full((2, 32), 1 + 2**-12)).tolist() == [1 + 2**-12] * 2
    assert model.scores(batch()).dtype == torch.float32


def test_head_computes_in_fp32_with_a_bf16_weight(tiny_model: Path) -> None:
    lm = load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32, seed=1)
    features = torch.linspace(-3, 3, 32)
    expected = (features.double() @ lm.score.weight.bfloat16().double().squeeze(0)).item()
    lm.score.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lm.score(features)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
