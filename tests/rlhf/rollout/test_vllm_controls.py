"""Sampling controls and stop strings: vLLM on a CPU against the engine hf and the trainer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from components.rlhf.data.records import Prompt
from components.rlhf.models.loading import load_stop_ids
from components.rlhf.rollout.controls import sampling_distribution
from components.rlhf.rollout.stopping import ResponseText
from components.rlhf.rollout.vllm import VllmRolloutEngine
from tests.rlhf.rollout.test_controls import are_sampled_from, every_control, slow_probabilities
from tests.rlhf.rollout.test_vllm import (
    COLD,
    MANY_STOPS,
    PROMPTS,
    _environment,
    hf,
    ids_of,
    model,
    prompt_logprobs,
    sampling,
    start,
    trained,
    trainers_logprobs,
)
from tests.support.wordy_tokenizer import use_wordy_tokenizer

__all__ = ["_environment"]
STOPS = ("e", "END", "\n\n", "né", "😀", "Dog", "ab", "日本")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return use_wordy_tokenizer(model(tmp_path_factory.mktemp("controls"), 0))


@pytest.fixture(scope="module")
def sampler(folder: Path) -> Iterator[VllmRolloutEngine]:
    engine = start(folder, stop_ids=MANY_STOPS, num_sequences=64)
    yield engine
    engine.close()


@pytest.mark.vllm
@every_control
def test_logprobs_are_the_trainers(sampler: VllmRolloutEngine, folder: Path, controls: dict[str, Any]) -> None:
    """The gap of the engines (engine_gap) for each control; every sampled token is one that the trainer keeps."""
    config = sampling(**({"max_new_tokens": 12} | controls))
    found = sampler.generate(PROMPTS * 6, config, list(range(36)))
    distribution = sampling_distribution(config, MANY_STOPS)
    for c, expected in zip(found, trainers_logprobs(trained(folder), found, distribution), strict=True):
        assert torch.allclose(prompt_logprobs(c), expected, atol=1e-4)


@pytest.mark.vllm
@every_control
def test_sampled_tokens_are_those_that_a_slow_version_keeps(
    sampler: VllmRolloutEngine, folder: Path, controls: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "stop_ids", ())
    config, number = sampling(**(controls | {"max_new_tokens": 1, "min_new_tokens": 0})), 1500
    found = sampler.generate(PROMPTS[:1] * number, config, [7 * 1_000_003 + n for n in range(number)])
    with torch.no_grad():
        logits = trained(folder)(torch.tensor([found[0].prompt_ids])).logits[0, -1]
    expected = slow_probabilities(logits, found[0].prompt_ids, 0, config, ())
    tokens = torch.tensor(ids_of(found))[:, 0]
    assert are_sampled_from(expected, tokens)


@pytest.mark.vllm
@every_control
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "cold"])
def test_deterministic_responses_are_those_of_transformers(
    sampler: VllmRolloutEngine, folder: Path, controls: dict[str, Any], greedy: bool
) -> None:
    config = sampling(**(controls | {"max_new_tokens": 20, "temperature": COLD}))
    found, expected = (e.generate(PROMPTS, config, range(6), greedy=greedy) for e in (sampler, hf(folder, MANY_STOPS)))
    assert ids_of(found) == ids_of(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(prompt_logprobs(a), prompt_logprobs(b), atol=1e-3)


@pytest.mark.vllm
@pytest.mark.parametrize("min_new_tokens", [0, 5])
def test_stop_strings_are_those_of_the_engine_hf(
    sampler: VllmRolloutEngine, min_new_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever vLLM samples, the text that hf decodes from the same tokens stops at the same one, with the same text."""
    monkeypatch.setattr(sampler, "stop_ids", (0,))
    config = sampling(max_new_tokens=40, stop=STOPS, min_new_tokens=min_new_tokens)
    prompts = [*PROMPTS, Prompt(prompt="the END")] * 40
    found = sampler.generate(prompts, config, list(range(len(prompts))))
    ends = set()
    for c in found:
        text = ResponseText(sampler.tokenizer, c.prompt_ids, config)
        stopped = [token != 0 and text.append(token) for token in c.response_ids]
        assert not any(stopped[:-1])
        is_ended = c.response_ids[-1] == 0
        assert c.truncated == (not stopped[-1] and not is_ended)
        assert len(prompt_logprobs(c)) == len(c.response_ids)
        if stopped[-1]:
            assert c.response == text.text
        else:
            assert is_ended or len(c.response_ids) == 40
        ends.add("stop" if stopped[-1] else "eos" if is_ended else "length")
    assert "stop" in ends and len({c.response for c in found}) > 100


@pytest.mark.vllm
def test_greedy_responses_with_stop_strings_are_those_of_transformers(
    sampler: VllmRolloutEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "stop_ids", ())
    prompts = [Prompt(prompt=text) for text in ("a", "of", "it was", "END the", "Dog", "x y z", "bb", "q")]
    how = {"max_new_tokens": 24, "repetition_penalty": 1.6}  # against loops
    free = hf(folder, ()).generate(prompts, sampling(**how), range(8), greedy=True)
    stops = tuple(c.response[n : n + 3] for n, c in enumerate(free) if "\ufffd" not in c.response[n : n + 3])[:8]
    found, expected = (
        e.generate(prompts, sampling(**how, stop=stops), range(8), greedy=True) for e in (sampler, hf(folder, ()))
    )
    assert [(c.response_ids, c.response, c.truncated) for c in found] == [
        (c.response_ids, c.response, c.truncated) for c in expected
    ]
    assert sum(not c.truncated for c in found) > 4


@pytest.mark.vllm
def test_stop_tokens_still_end_responses(sampler: VllmRolloutEngine, folder: Path) -> None:
    found = sampler.generate(PROMPTS * 4, sampling(max_new_tokens=12, stop=("never there",)), list(range(24)))
    for c in found:
        assert c.truncated == (c.response_ids[-1] not in MANY_STOPS)
    assert load_stop_ids(folder) == (0,)
