import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.batching import collate
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm
from components.rlhf.rollout.hf import HfRolloutEngine, _draw
from tests.support.tiny_model import make_tiny_model

TEXTS = ["a film", "b", "the longest prompt of all", "no", "what a day it was", "zz"]
PROMPTS = [Prompt(prompt=text) for text in TEXTS]
# Half of the vocabulary, so that a response stops with a probability of about 1/2 per token.
MANY_STOPS = tuple(range(0, 257, 2))


def engine_of(folder: Path, *, stop_ids: tuple[int, ...] = (0,)) -> HfRolloutEngine:
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    return HfRolloutEngine(lm, AutoTokenizer.from_pretrained(folder), stop_ids=stop_ids)


def sampling(**overrides: Any) -> SamplingConfig:
    return SamplingConfig(**({"max_new_tokens": 8} | overrides))


def ids_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.response_ids for completion in completions]


# At this temperature sampling is greedy decoding, for which transformers is the reference.
LOW_TEMPERATURE = 1e-4


def transformers_ids(folder: Path, *, max_new_tokens: int, stops: list[int] | None, min_new_tokens: int = 0) -> Any:
    """Response ids by greedy decoding with transformers, one unpadded prompt at a time."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    lm.generation_config.eos_token_id = stops
    responses = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        out = lm.generate(**ids, do_sample=False, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None)
        responses.append(out[0, ids["input_ids"].shape[1] :].tolist())
    return responses


def engine_ids(folder: Path, stops: tuple[int, ...], **settings: Any) -> list[list[int]]:
    completions = engine_of(folder, stop_ids=stops).generate(
        PROMPTS, sampling(temperature=LOW_TEMPERATURE, **settings), list(range(len(TEXTS)))
    )
    return ids_of(completions)


def test_greedy_tokens_equal_transformers(tiny_model: Path) -> None:
    expected = transformers_ids(tiny_model, max_new_tokens=12, stops=None)
    assert engine_ids(tiny_model, (), max_new_tokens=12) == expected


@pytest.mark.parametrize("min_new_tokens", [0, 4])
def test_greedy_tokens_equal_transformers_with_stop_ids(tiny_model: Path, min_new_tokens: int) -> None:
    unstopped = transformers_ids(tiny_model, max_new_tokens=12, stops=None)
    stops = [unstopped[0][2], unstopped[2][5], unstopped[4][8]]
    expected = transformers_ids(tiny_model, max_new_tokens=12, stops=stops, min_new_tokens=min_new_tokens)
    assert len({len(row) for row in expected}) > 2  # otherwise no row would stop before another
    assert engine_ids(tiny_model, tuple(stops), max_new_tokens=12, min_new_tokens=min_new_tokens) == expected


@pytest.mark.parametrize("min_new_tokens", [0, 4])
def test_greedy_decoding_equals_transformers_at_any_temperature(tiny_model: Path, min_new_tokens: int) -> None:
    unstopped = transformers_ids(tiny_model, max_new_tokens=12, stops=None)
    stops = [unstopped[0][2], unstopped[2][5], unstopped[4][8]]
    expected = transformers_ids(tiny_model, max_new_tokens=12, stops=stops, min_new_tokens=min_new_tokens)
    engine = engine_of(tiny_model, stop_ids=tuple(stops))
    how = sampling(temperature=3.0, max_new_tokens=12, min_new_tokens=min_new_tokens)
    found = engine.generate(PROMPTS, how, range(6), greedy=True)
    assert ids_of(found) == expected
    assert ids_of(engine.generate(PROMPTS, how, range(6))) != expected
    distribution = SamplingDistribution(min_new_tokens=min_new_tokens, stop_ids=tuple(stops))
    for row, completion in zip(actors_logprobs(tiny_model, found, distribution), found, strict=True):
        assert torch.allclose(row[: len(completion.response_ids)], _logprobs(completion), atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_completion_does_not_depend_on_its_batch(tiny_model: Path, batch_size: int) -> None:
    engine, seeds = engine_of(tiny_model, stop_ids=MANY_STOPS), [11, 5, 11, 3, 99, 0]
    expected = engine.generate(PROMPTS, sampling(), seeds)
    order = [4, 2, 0, 5, 1, 3]
    shuffled = engine.generate([PROMPTS[i] for i in order], sampling(batch_size=batch_size), [seeds[i] for i in order])
    for i, got in zip(order, shuffled, strict=True):
        assert got.response_ids == expected[i].response_ids
        assert got.prompt == PROMPTS[i]
        assert torch.allclose(_logprobs(got), _logprobs(expected[i]), atol=1e-5)


def test_same_seed_gives_same_completion(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    a, b, c = (engine.generate(PROMPTS[:1], sampling(), [seed])[0].response_ids for seed in (4, 4, 5))
    assert a == b != c


def test_max_new_tokens_does_not_change_earlier_tokens(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    short, long = (engine.generate(PROMPTS, sampling(max_new_tokens=n), [1] * 6) for n in (3, 9))
    assert [ids[:3] for ids in ids_of(long)] == ids_of(short)


def test_stop_token_is_kept_and_ends_the_response(tiny_model: Path) -> None:
    completions = engine_of(tiny_model, stop_ids=MANY_STOPS).generate(PROMPTS * 20, sampling(), list(range(120)))
    stopped = [c for c in completions if not c.truncated]
    truncated = [c for c in completions if c.truncated]
    assert len(stopped) > 60
    for c in stopped:
        assert c.response_ids[-1] in MANY_STOPS
        assert len(c.response_ids) <= 8
    for c in truncated:
        assert len(c.response_ids) == 8
        assert c.response_ids[-1] not in MANY_STOPS
    assert all(token not in MANY_STOPS for c in completions for token in c.response_ids[:-1])
    assert len({len(c.response_ids) for c in stopped}) > 3


def test_all_completions_are_truncated_without_stop_ids(tiny_model: Path) -> None:
    completions = engine_of(tiny_model, stop_ids=()).generate(PROMPTS, sampling(max_new_tokens=3), [0] * 6)
    assert all(c.truncated and len(c.response_ids) == 3 for c in completions)


@pytest.mark.parametrize("min_new_tokens", [1, 3, 8])
def test_no_stop_token_before_min_new_tokens(tiny_model: Path, min_new_tokens: int) -> None:
    settings = sampling(min_new_tokens=min_new_tokens)
    completions = engine_of(tiny_model, stop_ids=MANY_STOPS).generate(PROMPTS * 10, settings, list(range(60)))
    assert all(token not in MANY_STOPS for c in completions for token in c.response_ids[:min_new_tokens])
    lengths = {len(c.response_ids) for c in completions}
    assert min(lengths) == min(min_new_tokens + 1, 8)  # the next token may be a stop token


def test_response_text_has_no_special_tokens(tiny_model: Path) -> None:
    engine, tokenizer = engine_of(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    completions = engine.generate(PROMPTS * 20, sampling(max_new_tokens=24, temperature=3.0), list(range(120)))
    with_eos = [c for c in completions if c.response_ids[-1] == 0]
    assert with_eos
    for c in with_eos:
        assert "<eos>" not in c.response
        assert c.response == tokenizer.decode(c.response_ids[:-1])


def test_prompt_ids_are_those_of_the_prompt(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for c in engine_of(tiny_model).generate(PROMPTS, sampling(max_new_tokens=1), [0] * 6):
        assert c.prompt_ids == tokenizer(c.prompt.prompt)["input_ids"]


@pytest.mark.parametrize(
    "overrides", [{}, {"temperature": 0.5}, {"temperature": 1.7, "min_new_tokens": 4}], ids=["plain", "cold", "late"]
)
def test_logprobs_equal_those_of_the_actor(tiny_model: Path, overrides: dict[str, Any]) -> None:
    """The engine pads on the left and uses a KV cache; the actor pads on the right without a cache."""
    engine, config = engine_of(tiny_model, stop_ids=MANY_STOPS), sampling(**overrides)
    completions = engine.generate(PROMPTS * 4, config, list(range(24)))
    distribution = SamplingDistribution(
        temperature=config.temperature, min_new_tokens=config.min_new_tokens, stop_ids=MANY_STOPS
    )
    logprobs = actors_logprobs(tiny_model, completions, distribution)
    for row, completion in zip(logprobs, completions, strict=True):
        assert torch.allclose(row[: len(completion.response_ids)], _logprobs(completion), atol=1e-4)


def actors_logprobs(folder: Path, completions: Sequence[Completion], distribution: SamplingDistribution) -> Tensor:
    rows = collate([c.prompt_ids for c in completions], [c.response_ids for c in completions])
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32)
    with torch.no_grad():
        logprobs, _ = Actor(lm, num_frozen_layers=0, dtype=torch.float32)(rows, distribution)
    return logprobs


NUM_SAMPLES = 6000


def sample_tokens(folder: Path, *, temperature: float) -> Tensor:
    """Two tokens of many samples of one prompt, with consecutive seeds as in PPO: [NUM_SAMPLES, 2]."""
    seeds = [1_000_003 * 1_000_003 + number for number in range(NUM_SAMPLES)]
    settings = sampling(temperature=temperature, max_new_tokens=2, batch_size=2000)
    completions = engine_of(folder, stop_ids=()).generate([Prompt(prompt="a film")] * NUM_SAMPLES, settings, seeds)
    return torch.tensor(ids_of(completions))


def matches_distribution(tokens: Tensor, probabilities: Tensor) -> bool:
    """Chi-square test with rare tokens merged; a correct sampler fails for one of a thousand seeds."""
    expected = probabilities.double() / probabilities.double().sum() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected)).double()
    rare = expected < 8
    merged = [torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected)]
    return bool(chisquare(*merged).pvalue > 1e-3)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_frequencies_match_probabilities(tiny_model: Path, temperature: float) -> None:
    tokens = sample_tokens(tiny_model, temperature=temperature)
    lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
        AutoTokenizer.from_pretrained(tiny_model),
    )
    prompt = torch.tensor([tokenizer("a film")["input_ids"]])
    with torch.no_grad():
        first = torch.softmax(lm(prompt).logits[0, -1] / temperature, dim=-1)
        every = torch.cat([prompt.expand(257, -1), torch.arange(257)[:, None]], dim=1)
        after = torch.softmax(lm(every).logits[:, -1] / temperature, dim=-1)
    assert matches_distribution(tokens[:, 0], first)
    assert matches_distribution(tokens[:, 1], first @ after)
    assert not matches_distribution(tokens[:, 0], torch.softmax(first.log() * 0.8, dim=-1))  # the test has power


LOGITS = torch.tensor([0.2, 0.3, 0.5]).log()


@pytest.mark.parametrize(
    ("u", "token"), [(0.0, 0), (0.1, 0), (0.199, 0), (0.201, 1), (0.499, 1), (0.501, 2), (0.999, 2)]
)
def test_sample_inverts_the_cumulative_distribution(u: float, token: int) -> None:
    chosen, logprob = _draw(LOGITS[None], torch.tensor([u]))
    assert chosen.tolist() == [token]
    assert logprob.item() == pytest.approx(LOGITS[token].item(), abs=1e-6)


@pytest.mark.parametrize("possible", [[0], [3], [6], [0, 6], [2, 3], [1, 5]])
def test_impossible_token_is_never_sampled(possible: list[int]) -> None:
    """Not for a uniform of 0, for the largest below 1, or for one at a boundary between two tokens."""
    logits = torch.full((7,), float("-inf"))
    logits[possible] = torch.linspace(-1.0, 2.0, len(possible))
    boundaries = torch.softmax(logits, -1).cumsum(-1).tolist()
    uniforms = [0.0, 2**-24, 0.5, 1 - 2**-24, *(x for x in boundaries if x < 1)]
    uniforms += [random.Random(0).random() for _ in range(100)]
    chosen, logprobs = _draw(logits.expand(len(uniforms), -1), torch.tensor(uniforms, dtype=torch.float64))
    assert set(chosen.tolist()) <= set(possible)
    assert logprobs.isfinite().all()
    assert chosen[0] == possible[0]
    assert chosen[3] == possible[-1]


def test_large_vocabulary_loses_no_mass_to_rounding() -> None:
    """100 tokens of probability 1e-9 after a near-certain one: an fp32 sum would lose them."""
    logits = torch.cat([torch.zeros(1), torch.full((100,), math.log(1e-9))])
    chosen, _ = _draw(logits[None], torch.tensor([1 - 2**-24]))  # 6e-8 below 1: about the 41st of them
    assert 30 < chosen.item() < 50
    equal, _ = _draw(torch.zeros(2, 50_000), torch.tensor([1 - 2**-24, 0.50001]))
    assert equal.tolist() == [49_999, 25_000]


def test_rows_are_sampled_independently() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    chosen, _ = _draw(logits, torch.tensor([0.4, 0.4]))
    assert chosen.tolist() == [1, 0]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_sync_loads_all_weights_including_a_tied_head(tmp_path: Path, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "old", seed=0, tied=tied)
    engine = engine_of(folder)
    before = engine.generate(PROMPTS, sampling(), [1] * 6)
    trained = load_causal_lm(
        make_tiny_model(tmp_path / "new", seed=1, tied=tied), num_frozen_layers=0, dtype=torch.float32
    )
    assert engine.version == 0
    assert engine.sync(trained.named_parameters()) == 1
    after = engine.generate(PROMPTS, sampling(), [1] * 6)
    fresh = engine_of(tmp_path / "new").generate(PROMPTS, sampling(), [1] * 6)
    assert ids_of(after) == ids_of(fresh) != ids_of(before)
    assert {c.weight_version for c in before} == {0} and {c.weight_version for c in after} == {1}
    assert all(torch.equal(_logprobs(a), _logprobs(b)) for a, b in zip(after, fresh, strict=True))
    assert (engine.model.lm_head.weight is engine.model.model.embed_tokens.weight) == tied
    assert engine.sync([]) == 2


def test_sync_copies_weights(tiny_model: Path) -> None:
    engine = engine_of(tiny_model)
    trained = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32)
    engine.sync(trained.named_parameters())
    before = engine.generate(PROMPTS, sampling(), [1] * 6)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.zero_()
    assert ids_of(engine.generate(PROMPTS, sampling(), [1] * 6)) == ids_of(before)


def test_sync_rounds_to_the_engine_dtype(tiny_model: Path) -> None:
    lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False)
    engine = HfRolloutEngine(lm, AutoTokenizer.from_pretrained(tiny_model), stop_ids=(0,))
    weight = torch.full_like(lm.model.norm.weight, 1 + 2**-10, dtype=torch.float32)
    engine.sync([("model.norm.weight", weight)])
    assert lm.model.norm.weight.dtype == torch.bfloat16
    assert lm.model.norm.weight.unique().tolist() == [1.0]


def test_sync_of_an_unknown_weight_fails(tiny_model: Path) -> None:
    with pytest.raises(KeyError, match="lm.model"):
        engine_of(tiny_model).sync([("lm.model.norm.weight", torch.ones(32))])


def _logprobs(completion: Completion) -> Tensor:
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.response_ids)
    assert completion.logprobs.dtype == torch.float32
    assert all(math.isfinite(x) and x <= 0 for x in completion.logprobs.tolist())
    return completion.logprobs.clone()


@pytest.mark.parametrize("size", [100, 256, 512])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_draw_from_logits_that_are_not_finite_is_no_crash(size: int, bad: float) -> None:
    """The loss of the response then names the iteration."""
    logits = torch.zeros(2, size)
    logits[1, 3] = bad
    tokens, logprobs = _draw(logits, torch.tensor([0.999, 0.5]))
    assert ((tokens >= 0) & (tokens < size)).all()
    assert logprobs[0] == pytest.approx(-math.log(size), abs=1e-4) and logprobs[1].isnan()


def test_responses_that_continue_ids_within_limits_of_their_own(tiny_model: Path) -> None:
    """As if each had been the only prompt: the ids before are never decoded, and a limit only cuts."""
    engine, how = engine_of(tiny_model), sampling(batch_size=3)
    after = [[5, 6, 7], [], [200, 201], [128], [9] * 6, []]
    limits, seeds = [8, 3, 1, 5, 8, 2], list(range(6))
    found = engine.generate(PROMPTS, how, seeds, after=after, limits=limits)
    whole = engine.generate(PROMPTS, how, seeds, after=after)
    plain = engine.generate(PROMPTS, how, seeds)
    for row, (c, long) in enumerate(zip(found, whole, strict=True)):
        assert c.prompt_ids == plain[row].prompt_ids + after[row]
        assert c.response_ids == long.response_ids[: limits[row]]
        assert c.truncated == (c.response_ids[-1] not in engine.stop_ids)
        (alone,) = engine.generate([PROMPTS[row]], how, [row], after=[after[row]], limits=[limits[row]])
        assert alone.response_ids == c.response_ids
        assert torch.allclose(alone.logprobs, c.logprobs, atol=1e-5)  # type: ignore[arg-type]
    assert found[1].response_ids == plain[1].response_ids[:3] and found[0].response_ids != plain[0].response_ids
