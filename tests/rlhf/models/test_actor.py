from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import components.rlhf.models.actor as actor_module
from components.rlhf.data.batching import collate
from components.rlhf.models.actor import Actor, SamplingDistribution
from tests.support.small_models import PROMPTS, RESPONSES, actor_of, batch, rows_of

LENGTHS = [len(response) for response in RESPONSES]
PLAIN = SamplingDistribution()


def reference_logprobs(
    folder: Path, *, temperature: float = 1.0, min_new_tokens: int = 0, stops: tuple[int, ...] = ()
) -> list[list[float]]:
    """Log-probs from plain transformers, one unpadded row at a time."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0].detach()
        row = []
        for t, token in enumerate(response):
            scores = logits[len(prompt) - 1 + t].clone()
            if t < min_new_tokens:
                scores[list(stops)] = float("-inf")
            row.append(torch.log_softmax(scores / temperature, dim=-1)[token].item())
        found.append(row)
    return found


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_logprobs_equal_plain_transformers(tiny_model: Path, temperature: float) -> None:
    logprobs, _ = actor_of(tiny_model)(batch(), SamplingDistribution(temperature=temperature))
    for got, expected in zip(
        rows_of(logprobs, LENGTHS), reference_logprobs(tiny_model, temperature=temperature), strict=True
    ):
        assert got == pytest.approx(expected, abs=1e-5)


def test_stop_tokens_before_min_new_tokens_are_impossible(tiny_model: Path) -> None:
    distribution = SamplingDistribution(temperature=0.8, min_new_tokens=3, stop_ids=(0, 104))
    logprobs, _ = actor_of(tiny_model)(batch(), distribution)
    expected = reference_logprobs(tiny_model, temperature=0.8, min_new_tokens=3, stops=(0, 104))
    for got, row in zip(rows_of(logprobs, LENGTHS), expected, strict=True):
        assert got == pytest.approx(row, abs=1e-5)
    assert logprobs[1, 1] == float("-inf")  # token 0 at step 1: impossible
    assert logprobs[0, 2] == float("-inf")  # token 0 at step 2: still impossible
    assert logprobs[1, 3].isfinite()  # token 104 at step 3: possible


def test_logprobs_and_entropy_are_zero_at_padding(tiny_model: Path) -> None:
    logprobs, entropy = actor_of(tiny_model)(batch(), PLAIN, with_entropy=True)
    assert not logprobs[~batch().response_mask].any()
    assert not entropy[~batch().response_mask].any()


def test_row_without_a_response(tiny_model: Path) -> None:
    logprobs, entropy = actor_of(tiny_model)(collate([[5, 6]], [[]]), PLAIN, with_entropy=True)
    assert logprobs.tolist() == [[0.0]]
    assert entropy.tolist() == [[0.0]]


def test_entropy_is_that_of_the_sampling_distribution(tiny_model: Path) -> None:
    distribution = SamplingDistribution(temperature=0.7, min_new_tokens=2, stop_ids=(0,))
    _, entropy = actor_of(tiny_model)(batch(), distribution, with_entropy=True)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = lm(torch.tensor([prompt + response])).logits[0].detach().double()
        for t in range(len(response)):
            scores = logits[len(prompt) - 1 + t]
            if t < 2:
                scores = scores[1:]  # the stop id 0 is masked
            p = torch.softmax(scores / 0.7, dim=-1)
            assert entropy[row, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)


def test_entropy_is_optional_and_has_a_gradient(tiny_model: Path) -> None:
    actor = actor_of(tiny_model)
    assert not actor(batch(), PLAIN)[1].any()
    actor(batch(), PLAIN, with_entropy=True)[1].sum().backward()
    (head,) = [p.grad for name, p in actor.named_parameters() if name.endswith("embed_tokens.weight")]
    assert head is not None and bool(head.isfinite().all()) and bool(head.any())


def run_forward_and_backward(actor: Actor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    actor.zero_grad()
    logprobs, entropy = actor(batch(), PLAIN, with_entropy=True)
    (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropy, gradients


def test_chunks_do_not_change_logprobs_or_gradients(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_of(tiny_model)
    logprobs, entropy, gradients = run_forward_and_backward(actor)
    monkeypatch.setattr(actor_module, "MAX_LOGITS", 2 * actor.lm.config.vocab_size)
    chunked, chunked_entropy, chunked_gradients = run_forward_and_backward(actor)
    assert torch.allclose(chunked, logprobs, atol=1e-6)
    assert torch.allclose(chunked_entropy, entropy, atol=1e-6)
    assert chunked_gradients.keys() == gradients.keys() == dict(actor.named_parameters()).keys()
    for name, gradient in gradients.items():
        # Sums in another order have rounding errors relative to their largest terms.
        gap = (chunked_gradients[name] - gradient).abs().max()
        assert gap < 1e-5 * gradient.abs().max(), (name, float(gap))


def test_chunks_bound_the_logits_in_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor = actor_of(tiny_model)
    monkeypatch.setattr(actor_module, "MAX_LOGITS", 5 * actor.lm.config.vocab_size - 1)
    chunk_sizes: list[int] = []
    actor.lm.lm_head.register_forward_hook(lambda _module, _args, logits: chunk_sizes.append(logits.shape[1]))
    with torch.no_grad():
        actor(batch(), PLAIN)
    assert chunk_sizes == [4, 4, 4, 3]  # 15 response tokens, no prompt tokens


# Other batches with the same rows: more padding, fewer rows, another order.
REBATCHED = {
    "more padding": lambda run: run([*PROMPTS, [1] * 30], [*RESPONSES, [2] * 30])[:4],
    "alone": lambda run: [run([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)],
    "reversed": lambda run: run(PROMPTS[::-1], RESPONSES[::-1])[::-1],
}


@pytest.mark.parametrize("rebatched", REBATCHED.values(), ids=REBATCHED.keys())
def test_logprobs_do_not_depend_on_the_rest_of_the_batch(
    tiny_model: Path, rebatched: Callable[[Callable[..., list[list[float]]]], list[list[float]]]
) -> None:
    actor = actor_of(tiny_model)

    def run(prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
        logprobs, _ = actor(collate(prompts, responses), PLAIN)
        return rows_of(logprobs, [len(response) for response in responses])

    for got, expected in zip(rebatched(run), run(PROMPTS, RESPONSES), strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


def test_ids_at_padding_do_not_matter(tiny_model: Path) -> None:
    actor, original = actor_of(tiny_model), batch()
    logprobs, _ = actor(original, PLAIN)
    columns = torch.arange(original.input_ids.shape[1])
    padding = columns[None, :] > original.last_positions()[:, None]
    other = replace(original, input_ids=torch.where(padding, 77, original.input_ids))
    assert torch.equal(actor(other, PLAIN)[0], logprobs)


def test_frozen_layers_do_not_change_logprobs(tiny_model: Path) -> None:
    expected, _ = actor_of(tiny_model)(batch(), PLAIN)
    actor = actor_of(tiny_model, frozen=2)
    states = actor.trunk(batch())
    assert states is not None
    assert not states.requires_grad
    assert torch.equal(actor(batch(), PLAIN)[0], expected)
    assert torch.equal(actor(batch(), PLAIN, states)[0], expected)


def test_given_states_are_used(tiny_model: Path) -> None:
    actor = actor_of(tiny_model, frozen=1)
    states = actor.trunk(batch())
    assert states is not None
    assert not torch.equal(actor(batch(), PLAIN, states + 1)[0], actor(batch(), PLAIN, states)[0])


def test_trunk_is_none_without_frozen_layers(tiny_model: Path) -> None:
    assert actor_of(tiny_model).trunk(batch()) is None


def test_step_updates_only_layers_above_the_frozen_ones(tiny_model: Path) -> None:
    actor = actor_of(tiny_model, frozen=2)
    before = {name: p.clone() for name, p in actor.named_parameters()}
    (-actor(batch(), PLAIN)[0].sum()).backward()
    with torch.no_grad():
        for parameter in actor.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    updated = {name for name, p in actor.named_parameters() if not torch.equal(p, before[name])}
    assert updated == {name for name in before if name.startswith(("lm.model.layers.2.", "lm.model.norm."))}


def test_bf16_is_close_to_fp32(tiny_model: Path) -> None:
    fp32_logprobs, _ = actor_of(tiny_model)(batch(), PLAIN)
    bf16_logprobs, _ = actor_of(tiny_model, frozen=1, dtype=torch.bfloat16)(batch(), PLAIN)
    assert bf16_logprobs.dtype == torch.float32
    assert torch.allclose(bf16_logprobs, fp32_logprobs, atol=0.3)
    assert not torch.equal(bf16_logprobs, fp32_logprobs)


# Logits in pieces.


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize(
    "distribution",
    [PLAIN, SamplingDistribution(temperature=0.7, min_new_tokens=3, stop_ids=(0, 104))],
    ids=["plain", "masked"],
)
def test_pieces_of_logits_give_the_logprobs(
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    distribution: SamplingDistribution,
    frozen: int,
    with_states: bool,
) -> None:
    actor, tokens = actor_of(tiny_model, frozen=frozen), batch()
    with torch.no_grad():
        expected = actor(tokens, distribution)[0][tokens.response_mask]
    vocab_size = actor.lm.config.vocab_size
    monkeypatch.setattr(actor_module, "MAX_LOGITS", 5 * vocab_size - 1)
    pieces = list(actor.logits(tokens, distribution, actor.trunk(tokens) if with_states else None))
    assert [piece.shape for piece in pieces] == [(4, vocab_size)] * 3 + [(3, vocab_size)]  # 15 response tokens
    assert not any(piece.requires_grad for piece in pieces)
    logprobs = torch.log_softmax(torch.cat(pieces) / distribution.temperature, dim=-1)
    labels = torch.tensor([token for response in RESPONSES for token in response])
    got = logprobs[torch.arange(15), labels]
    assert torch.equal(got.isneginf(), expected.isneginf())
    assert torch.allclose(got[got.isfinite()], expected[got.isfinite()], atol=1e-5)
    assert bool(got.isneginf().any()) == (distribution.min_new_tokens > 0)


def test_logits_are_those_of_plain_transformers(tiny_model: Path) -> None:
    """Also with a temperature, which is left to the caller; stop tokens are masked in the first two steps."""
    distribution = SamplingDistribution(temperature=0.5, min_new_tokens=2, stop_ids=(0,))
    got = torch.cat(list(actor_of(tiny_model).logits(batch(), distribution)))
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
        logits[:2, 0] = float("-inf")
        rows.append(logits)
    assert torch.allclose(got, torch.cat(rows), atol=1e-5)


def test_given_states_are_used_for_logits(tiny_model: Path) -> None:
    actor = actor_of(tiny_model, frozen=1)
    states = actor.trunk(batch())
    assert states is not None
    (plain,), (other,) = (list(actor.logits(batch(), PLAIN, s)) for s in (states, states + 1))
    assert not torch.equal(plain, other)


def test_row_without_a_response_has_no_logits(tiny_model: Path) -> None:
    actor = actor_of(tiny_model)
    pieces = list(actor.logits(collate([[5, 6]], [[]]), PLAIN))
    assert torch.cat(pieces).shape == (0, actor.lm.config.vocab_size)
