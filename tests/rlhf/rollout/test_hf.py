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
from components.rlhf.rollout.hf import HfRolloutEngine, _sample
from tests.support.tiny_model import make_tiny_model

TEXTS = ["a film", "b", "the longest prompt of all", "no", "what a day it was", "zz"]
PROMPTS = [Prompt(prompt=text) for text in TEXTS]
# Half of the vocabulary: a response goes on with a chance of about a half a token.
MANY_STOPS = tuple(range(0, 257, 2))


def engine_of(folder: Path, *, stop_ids: tuple[int, ...] = (0,)) -> HfRolloutEngine:
    lm = load_causal_lm(folder, num_frozen_layers=0, dtype=torch.float32, trainable=False)
    return HfRolloutEngine(lm, AutoTokenizer.from_pretrained(folder), stop_ids=stop_ids)


def sampling(**settings: Any) -> SamplingConfig:
    return SamplingConfig(**({"max_new_tokens": 8} | settings))


def ids_of(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.response_ids for completion in completions]


class TestGreedy:
    """At a very low temperature sampling is greedy decoding, and there transformers itself is the reference."""

    COLD = 1e-4

    def greedy(self, folder: Path, *, max_new_tokens: int, stops: list[int] | None, min_new_tokens: int = 0) -> Any:
        """The response ids of each prompt by transformers' own loop, one unpadded prompt at a time."""
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        lm.generation_config.eos_token_id = stops
        found = []
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
            out = lm.generate(
                **ids, do_sample=False, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens or None
            )
            found.append(out[0, ids["input_ids"].shape[1] :].tolist())
        return found

    def ours(self, folder: Path, stops: tuple[int, ...], **settings: Any) -> list[list[int]]:
        found = engine_of(folder, stop_ids=stops).generate(
            PROMPTS, sampling(temperature=self.COLD, **settings), list(range(len(TEXTS)))
        )
        return ids_of(found)

    def test_is_transformers_token_for_token(self, tiny_model: Path) -> None:
        expected = self.greedy(tiny_model, max_new_tokens=12, stops=None)
        assert self.ours(tiny_model, (), max_new_tokens=12) == expected

    @pytest.mark.parametrize("min_new_tokens", [0, 4])
    def test_with_stops_that_rows_reach_one_after_the_other(self, tiny_model: Path, min_new_tokens: int) -> None:
        unstopped = self.greedy(tiny_model, max_new_tokens=12, stops=None)
        stops = [unstopped[0][2], unstopped[2][5], unstopped[4][8]]
        expected = self.greedy(tiny_model, max_new_tokens=12, stops=stops, min_new_tokens=min_new_tokens)
        assert len({len(row) for row in expected}) > 2  # or no row would leave the batch before another
        assert self.ours(tiny_model, tuple(stops), max_new_tokens=12, min_new_tokens=min_new_tokens) == expected


class TestSeeds:
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
    def test_a_completion_does_not_depend_on_the_batch_it_is_in(self, tiny_model: Path, batch_size: int) -> None:
        engine, seeds = engine_of(tiny_model, stop_ids=MANY_STOPS), [11, 5, 11, 3, 99, 0]
        expected = engine.generate(PROMPTS, sampling(), seeds)
        order = [4, 2, 0, 5, 1, 3]
        shuffled = engine.generate(
            [PROMPTS[i] for i in order], sampling(batch_size=batch_size), [seeds[i] for i in order]
        )
        for i, got in zip(order, shuffled, strict=True):
            assert got.response_ids == expected[i].response_ids
            assert got.prompt == PROMPTS[i]
            assert torch.allclose(_logprobs(got), _logprobs(expected[i]), atol=1e-5)

    def test_the_same_seed_again_and_another_one(self, tiny_model: Path) -> None:
        engine = engine_of(tiny_model)
        a, b, c = (engine.generate(PROMPTS[:1], sampling(), [seed])[0].response_ids for seed in (4, 4, 5))
        assert a == b != c

    def test_a_longer_response_starts_like_the_shorter_one(self, tiny_model: Path) -> None:
        engine = engine_of(tiny_model)
        short, long = (engine.generate(PROMPTS, sampling(max_new_tokens=n), [1] * 6) for n in (3, 9))
        assert [ids[:3] for ids in ids_of(long)] == ids_of(short)


class TestEnds:
    def test_a_stop_token_is_kept_and_ends_the_response(self, tiny_model: Path) -> None:
        found = engine_of(tiny_model, stop_ids=MANY_STOPS).generate(PROMPTS * 20, sampling(), list(range(120)))
        ended = [c for c in found if not c.truncated]
        cut = [c for c in found if c.truncated]
        assert len(ended) > 60
        for c in ended:
            assert c.response_ids[-1] in MANY_STOPS
            assert len(c.response_ids) <= 8
        for c in cut:
            assert len(c.response_ids) == 8
            assert c.response_ids[-1] not in MANY_STOPS
        assert all(token not in MANY_STOPS for c in found for token in c.response_ids[:-1])
        assert len({len(c.response_ids) for c in ended}) > 3

    def test_all_are_truncated_where_nothing_stops(self, tiny_model: Path) -> None:
        found = engine_of(tiny_model, stop_ids=()).generate(PROMPTS, sampling(max_new_tokens=3), [0] * 6)
        assert all(c.truncated and len(c.response_ids) == 3 for c in found)

    @pytest.mark.parametrize("least", [1, 3, 8])
    def test_no_stop_before_the_least_number_of_tokens(self, tiny_model: Path, least: int) -> None:
        settings = sampling(min_new_tokens=least)
        found = engine_of(tiny_model, stop_ids=MANY_STOPS).generate(PROMPTS * 10, settings, list(range(60)))
        assert all(token not in MANY_STOPS for c in found for token in c.response_ids[:least])
        lengths = {len(c.response_ids) for c in found}
        assert min(lengths) == min(least + 1, 8)  # and the token after them may be one

    def test_the_text_is_without_special_tokens(self, tiny_model: Path) -> None:
        engine, tokenizer = engine_of(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
        found = engine.generate(PROMPTS * 20, sampling(max_new_tokens=24, temperature=3.0), list(range(120)))
        ending = [c for c in found if c.response_ids[-1] == 0]
        assert ending
        for c in ending:
            assert "<eos>" not in c.response
            assert c.response == tokenizer.decode(c.response_ids[:-1])

    def test_prompt_ids_are_those_of_the_prompt(self, tiny_model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        for c in engine_of(tiny_model).generate(PROMPTS, sampling(max_new_tokens=1), [0] * 6):
            assert c.prompt_ids == tokenizer(c.prompt.prompt)["input_ids"]


class TestLogprobs:
    @pytest.mark.parametrize(
        "settings", [{}, {"temperature": 0.5}, {"temperature": 1.7, "min_new_tokens": 4}], ids=["plain", "cold", "late"]
    )
    def test_are_those_of_the_training_engine(self, tiny_model: Path, settings: dict[str, Any]) -> None:
        """Two programs, left padding with a cache and right padding without one, say the same of the same tokens."""
        engine, how = engine_of(tiny_model, stop_ids=MANY_STOPS), sampling(**settings)
        found = engine.generate(PROMPTS * 4, how, list(range(24)))
        rows = collate([c.prompt_ids for c in found], [c.response_ids for c in found])
        actor = Actor(
            load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32),
            num_frozen_layers=0,
            dtype=torch.float32,
        )
        distribution = SamplingDistribution(
            temperature=how.temperature, min_new_tokens=how.min_new_tokens, stop_ids=MANY_STOPS
        )
        with torch.no_grad():
            logprobs, _ = actor(rows, distribution)
        for row, completion in zip(logprobs, found, strict=True):
            assert torch.allclose(row[: len(completion.response_ids)], _logprobs(completion), atol=1e-4)


class TestDistribution:
    """Many samples of one prompt, with seeds that follow each other as PPO's do."""

    NUM = 6000

    def frequencies(self, folder: Path, *, temperature: float) -> Tensor:
        seeds = [1_000_003 * 1_000_003 + number for number in range(self.NUM)]
        settings = sampling(temperature=temperature, max_new_tokens=2, batch_size=2000)
        found = engine_of(folder, stop_ids=()).generate([Prompt(prompt="a film")] * self.NUM, settings, seeds)
        return torch.tensor(ids_of(found))

    def plausible(self, tokens: Tensor, probabilities: Tensor) -> bool:
        """Chi-square of the counts, rare tokens counted as one; a right sampler fails it once in a thousand seeds."""
        expected = probabilities.double() / probabilities.double().sum() * len(tokens)
        counts = torch.bincount(tokens, minlength=len(expected)).double()
        rare = expected < 8
        fold = [torch.cat([x[~rare], x[rare].sum()[None]]).numpy() for x in (counts, expected)]
        return bool(chisquare(*fold).pvalue > 1e-3)

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_tokens_come_as_often_as_their_probability_says(self, tiny_model: Path, temperature: float) -> None:
        tokens = self.frequencies(tiny_model, temperature=temperature)
        lm, tokenizer = (
            AutoModelForCausalLM.from_pretrained(tiny_model).eval(),
            AutoTokenizer.from_pretrained(tiny_model),
        )
        prompt = torch.tensor([tokenizer("a film")["input_ids"]])
        with torch.no_grad():
            first = torch.softmax(lm(prompt).logits[0, -1] / temperature, dim=-1)
            every = torch.cat([prompt.expand(257, -1), torch.arange(257)[:, None]], dim=1)
            after = torch.softmax(lm(every).logits[:, -1] / temperature, dim=-1)
        assert self.plausible(tokens[:, 0], first)
        assert self.plausible(tokens[:, 1], first @ after)
        assert not self.plausible(tokens[:, 0], torch.softmax(first.log() * 0.8, dim=-1))  # the test can fail


class TestDraw:
    LOGITS = torch.tensor([0.2, 0.3, 0.5]).log()

    @pytest.mark.parametrize(
        ("u", "token"), [(0.0, 0), (0.1, 0), (0.199, 0), (0.201, 1), (0.499, 1), (0.501, 2), (0.999, 2)]
    )
    def test_is_the_inverse_of_the_cumulative_distribution(self, u: float, token: int) -> None:
        chosen, logprob = _sample(self.LOGITS[None], torch.tensor([u]))
        assert chosen.tolist() == [token]
        assert logprob.item() == pytest.approx(self.LOGITS[token].item(), abs=1e-6)

    @pytest.mark.parametrize("possible", [[0], [3], [6], [0, 6], [2, 3], [1, 5]])
    def test_an_impossible_token_is_never_drawn(self, possible: list[int]) -> None:
        """Not at the smallest uniform, which is 0, nor at the largest below 1, nor at a border between two tokens."""
        logits = torch.full((7,), float("-inf"))
        logits[possible] = torch.linspace(-1.0, 2.0, len(possible))
        borders = torch.softmax(logits, -1).cumsum(-1).tolist()
        uniforms = [0.0, 2**-24, 0.5, 1 - 2**-24, *(x for x in borders if x < 1)]
        uniforms += [random.Random(0).random() for _ in range(100)]
        chosen, logprobs = _sample(logits.expand(len(uniforms), -1), torch.tensor(uniforms, dtype=torch.float64))
        assert set(chosen.tolist()) <= set(possible)
        assert logprobs.isfinite().all()
        assert chosen[0] == possible[0]
        assert chosen[3] == possible[-1]

    def test_a_large_vocabulary_loses_no_mass_to_rounding(self) -> None:
        """A hundred tokens of 1e-9 each behind a sure one: added up in fp32 they would be nothing, or all the same."""
        logits = torch.cat([torch.zeros(1), torch.full((100,), math.log(1e-9))])
        chosen, _ = _sample(logits[None], torch.tensor([1 - 2**-24]))  # 6e-8 below 1: about the 41st of them
        assert 30 < chosen.item() < 50
        equal, _ = _sample(torch.zeros(2, 50_000), torch.tensor([1 - 2**-24, 0.50001]))
        assert equal.tolist() == [49_999, 25_000]

    def test_rows_are_apart(self) -> None:
        logits = torch.stack([self.LOGITS, self.LOGITS.flip(0)])
        chosen, _ = _sample(logits, torch.tensor([0.4, 0.4]))
        assert chosen.tolist() == [1, 0]


class TestSync:
    @pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
    def test_takes_over_all_weights_and_a_tied_head_follows(self, tmp_path: Path, tied: bool) -> None:
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

    def test_copies_and_never_shares(self, tiny_model: Path) -> None:
        engine = engine_of(tiny_model)
        trained = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.float32)
        engine.sync(trained.named_parameters())
        before = engine.generate(PROMPTS, sampling(), [1] * 6)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.zero_()
        assert ids_of(engine.generate(PROMPTS, sampling(), [1] * 6)) == ids_of(before)

    def test_rounds_to_the_precision_it_samples_in(self, tiny_model: Path) -> None:
        lm = load_causal_lm(tiny_model, num_frozen_layers=0, dtype=torch.bfloat16, trainable=False)
        engine = HfRolloutEngine(lm, AutoTokenizer.from_pretrained(tiny_model), stop_ids=(0,))
        weight = torch.full_like(lm.model.norm.weight, 1 + 2**-10, dtype=torch.float32)
        engine.sync([("model.norm.weight", weight)])
        assert lm.model.norm.weight.dtype == torch.bfloat16
        assert lm.model.norm.weight.unique().tolist() == [1.0]

    def test_a_weight_that_is_not_there_is_an_error(self, tiny_model: Path) -> None:
        with pytest.raises(KeyError, match="lm.model"):
            engine_of(tiny_model).sync([("lm.model.norm.weight", torch.ones(32))])


def _logprobs(completion: Completion) -> Tensor:
    assert completion.logprobs is not None
    assert len(completion.logprobs) == len(completion.response_ids)
    assert completion.logprobs.dtype == torch.float32
    assert all(math.isfinite(x) and x <= 0 for x in completion.logprobs.tolist())
    return completion.logprobs.clone()
