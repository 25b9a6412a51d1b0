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


def slow_logprobs(
    folder: Path, *, temperature: float = 1.0, early: int = 0, stops: tuple[int, ...] = ()
) -> list[list[float]]:
    """One unpadded row at a time through plain transformers, one token at a time."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = lm(torch.tensor([prompt + response])).logits[0].detach()
        row = []
        for t, token in enumerate(response):
            scores = logits[len(prompt) - 1 + t].clone()
            if t < early:
                scores[list(stops)] = float("-inf")
            row.append(torch.log_softmax(scores / temperature, dim=-1)[token].item())
        found.append(row)
    return found


class TestLogprobs:
    @pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
    def test_are_those_of_plain_transformers(self, tiny_model: Path, temperature: float) -> None:
        logprobs, _ = actor_of(tiny_model)(batch(), SamplingDistribution(temperature=temperature))
        for got, expected in zip(
            rows_of(logprobs, LENGTHS), slow_logprobs(tiny_model, temperature=temperature), strict=True
        ):
            assert got == pytest.approx(expected, abs=1e-5)

    def test_of_stop_tokens_before_they_are_possible(self, tiny_model: Path) -> None:
        early = SamplingDistribution(temperature=0.8, min_new_tokens=3, stop_ids=(0, 104))
        logprobs, _ = actor_of(tiny_model)(batch(), early)
        expected = slow_logprobs(tiny_model, temperature=0.8, early=3, stops=(0, 104))
        for got, row in zip(rows_of(logprobs, LENGTHS), expected, strict=True):
            assert got == pytest.approx(row, abs=1e-5)
        assert logprobs[1, 1] == float("-inf")  # token 0 at step 1: impossible
        assert logprobs[0, 2] == float("-inf")  # token 0 at step 2: still impossible
        assert logprobs[1, 3].isfinite()  # token 104 at step 3: possible

    def test_are_zero_at_padding(self, tiny_model: Path) -> None:
        logprobs, entropy = actor_of(tiny_model)(batch(), PLAIN, with_entropy=True)
        assert not logprobs[~batch().response_mask].any()
        assert not entropy[~batch().response_mask].any()

    def test_of_a_row_without_a_response(self, tiny_model: Path) -> None:
        logprobs, entropy = actor_of(tiny_model)(collate([[5, 6]], [[]]), PLAIN, with_entropy=True)
        assert logprobs.tolist() == [[0.0]]
        assert entropy.tolist() == [[0.0]]


class TestEntropy:
    def test_is_that_of_the_sampling_distribution(self, tiny_model: Path) -> None:
        distribution = SamplingDistribution(temperature=0.7, min_new_tokens=2, stop_ids=(0,))
        _, entropy = actor_of(tiny_model)(batch(), distribution, with_entropy=True)
        lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
        for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
            logits = lm(torch.tensor([prompt + response])).logits[0].detach().double()
            for t in range(len(response)):
                scores = logits[len(prompt) - 1 + t]
                if t < 2:
                    scores = scores[1:]  # the stop id 0 does not exist yet
                p = torch.softmax(scores / 0.7, dim=-1)
                assert entropy[row, t].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-4)

    def test_is_not_computed_unasked_and_has_no_gradient(self, tiny_model: Path) -> None:
        actor = actor_of(tiny_model)
        assert not actor(batch(), PLAIN)[1].any()
        assert not actor(batch(), PLAIN, with_entropy=True)[1].requires_grad


class TestChunks:
    def run(self, actor: Actor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        actor.zero_grad()
        logprobs, entropy = actor(batch(), PLAIN, with_entropy=True)
        (logprobs * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in actor.named_parameters() if p.grad is not None}
        return logprobs.detach(), entropy, gradients

    def test_do_not_change_log_probs_or_gradients(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        actor = actor_of(tiny_model)
        logprobs, entropy, gradients = self.run(actor)
        monkeypatch.setattr(actor_module, "MAX_LOGITS", 2 * actor.lm.config.vocab_size)
        chunked, chunked_entropy, chunked_gradients = self.run(actor)
        assert torch.allclose(chunked, logprobs, atol=1e-6)
        assert torch.allclose(chunked_entropy, entropy, atol=1e-6)
        assert chunked_gradients.keys() == gradients.keys() == dict(actor.named_parameters()).keys()
        for name, gradient in gradients.items():
            # Sums of another order: the rounding is of the size of the terms, which the entries near 0 are not.
            gap = (chunked_gradients[name] - gradient).abs().max()
            assert gap < 1e-5 * gradient.abs().max(), (name, float(gap))

    def test_bound_the_logits_that_exist_at_once(self, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        actor = actor_of(tiny_model)
        monkeypatch.setattr(actor_module, "MAX_LOGITS", 5 * actor.lm.config.vocab_size - 1)
        rows: list[int] = []
        actor.lm.lm_head.register_forward_hook(lambda _module, _args, logits: rows.append(logits.shape[0]))
        with torch.no_grad():
            actor(batch(), PLAIN)
        assert rows == [4, 4, 4, 3]  # 15 response tokens, no prompt token


# What the neighbours of a row may be: more padding, fewer rows, another order.
REARRANGED = {
    "more padding": lambda run: run([*PROMPTS, [1] * 30], [*RESPONSES, [2] * 30])[:4],
    "alone": lambda run: [run([p], [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)],
    "reversed": lambda run: run(PROMPTS[::-1], RESPONSES[::-1])[::-1],
}


@pytest.mark.parametrize("rearranged", REARRANGED.values(), ids=REARRANGED.keys())
def test_neighbours_do_not_change_log_probs(
    tiny_model: Path, rearranged: Callable[[Callable[..., list[list[float]]]], list[list[float]]]
) -> None:
    actor = actor_of(tiny_model)

    def run(prompts: list[list[int]], responses: list[list[int]]) -> list[list[float]]:
        logprobs, _ = actor(collate(prompts, responses), PLAIN)
        return rows_of(logprobs, [len(response) for response in responses])

    for got, expected in zip(rearranged(run), run(PROMPTS, RESPONSES), strict=True):
        assert got == pytest.approx(expected, abs=1e-5)


def test_what_stands_at_padding_does_not_matter(tiny_model: Path) -> None:
    actor, rows = actor_of(tiny_model), batch()
    logprobs, _ = actor(rows, PLAIN)
    columns = torch.arange(rows.input_ids.shape[1])
    padding = columns[None, :] > rows.last_positions()[:, None]
    other = replace(rows, input_ids=torch.where(padding, 77, rows.input_ids))
    assert torch.equal(actor(other, PLAIN)[0], logprobs)


class TestFrozenLayers:
    def test_do_not_change_log_probs(self, tiny_model: Path) -> None:
        expected, _ = actor_of(tiny_model)(batch(), PLAIN)
        actor = actor_of(tiny_model, frozen=2)
        states = actor.trunk(batch())
        assert states is not None
        assert not states.requires_grad
        assert torch.equal(actor(batch(), PLAIN)[0], expected)
        assert torch.equal(actor(batch(), PLAIN, states)[0], expected)

    def test_given_states_are_used(self, tiny_model: Path) -> None:
        actor = actor_of(tiny_model, frozen=1)
        states = actor.trunk(batch())
        assert states is not None
        assert not torch.equal(actor(batch(), PLAIN, states + 1)[0], actor(batch(), PLAIN, states)[0])

    def test_there_are_no_states_without_them(self, tiny_model: Path) -> None:
        assert actor_of(tiny_model).trunk(batch()) is None

    def test_a_step_moves_what_is_above_them_and_nothing_else(self, tiny_model: Path) -> None:
        actor = actor_of(tiny_model, frozen=2)
        before = {name: p.clone() for name, p in actor.named_parameters()}
        (-actor(batch(), PLAIN)[0].sum()).backward()
        with torch.no_grad():
            for parameter in actor.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        moved = {name for name, p in actor.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name in before if name.startswith(("lm.model.layers.2.", "lm.model.norm."))}


def test_bf16_computes_close_to_fp32(tiny_model: Path) -> None:
    exact, _ = actor_of(tiny_model)(batch(), PLAIN)
    rough, _ = actor_of(tiny_model, frozen=1, dtype=torch.bfloat16)(batch(), PLAIN)
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, atol=0.3)
    assert not torch.equal(rough, exact)
