import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.evaluation.compare import Comparison, compare, cut_to_equal_length, sequence_kl
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.data.records import Completion, Prompt, RatedText
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm, save_model
from components.rlhf.rewards.linear import fit_to_ratings, load_judge
from components.rlhf.text.progress import Progress
from tests.support.tiny_model import make_tiny_model

PROMPTS = [Prompt(prompt=text, id=str(i)) for i, text in enumerate(["It is", "We", "A film that", "So", "It", "One"])]
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models and the judge of one comparison; the policy is an unrelated model."""
    root = tmp_path_factory.mktemp("compare")
    reward = load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=FP32, seed=1)
    reward.config.reward_mean, reward.config.reward_std = 0.5, 0.01
    save_model(reward, AutoTokenizer.from_pretrained(tiny_model), root / "reward", dtype=FP32)
    ratings = [
        RatedText(prompt="", completion=text, rating=len(text)) for text in ("it is so", "we", "a film that was")
    ]
    (root / "judge").mkdir()
    fit_to_ratings(ratings, max_ngram=1, regularisation=1.0).save(root / "judge")
    return {
        "sft_model": tiny_model,
        "policy": make_tiny_model(root / "policy", seed=5),
        "reward_model": root / "reward",
        "judge": root / "judge",
    }


def run(folders: dict[str, Path], *, seed: int = 0, frozen: int = 0, **sampling: Any) -> Comparison:
    stage = EvaluationStageConfig(
        model=ModelConfig(precision="fp32", num_frozen_layers=frozen),
        evaluation=EvaluationConfig(),
        sampling=SamplingConfig(**({"max_new_tokens": 5, "batch_size": 4} | sampling)),
        gate=GateConfig(),
        seed=seed,
    )
    return compare(stage, PROMPTS, **folders, progress=Progress("evaluation"))


def ids(completions: list[Completion]) -> list[list[int]]:
    return [c.response_ids for c in completions]


def test_both_models_answer_every_prompt(folders: dict[str, Path]) -> None:
    comparison = run(folders)
    assert comparison.prompts == PROMPTS
    for scored in (comparison.sft, comparison.ppo):
        assert [c.prompt for c in scored.completions] == PROMPTS
        assert len(scored.judge_scores) == len(scored.rewards) == len(PROMPTS)
    assert ids(comparison.sft.completions) != ids(comparison.ppo.completions)
    judge = load_judge(folders["judge"])
    assert comparison.ppo.judge_scores == judge.score(comparison.ppo.completions).tolist()


def test_cut_responses_are_scored_at_the_shorter_length(folders: dict[str, Path]) -> None:
    comparison = run(folders, max_new_tokens=12, temperature=3.0)
    judge, tokenizer = load_judge(folders["judge"]), AutoTokenizer.from_pretrained(folders["sft_model"])
    stop = 0
    for i, (a, b) in enumerate(zip(comparison.sft.completions, comparison.ppo.completions, strict=True)):
        response_ids = [[x for x in c.response_ids if x != stop] for c in (a, b)]  # a stop token is only at the end
        length = min(map(len, response_ids))
        for scored, ids in ((comparison.sft, response_ids[0]), (comparison.ppo, response_ids[1])):
            text = PROMPTS[i].prompt + tokenizer.decode(ids[:length])
            assert scored.cut_judge_scores[i] == pytest.approx(judge.score_texts([text]).item(), abs=1e-6)


def test_cut_to_equal_length_drops_stop_tokens(folders: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folders["sft_model"])

    def completion(ids: list[int], *, truncated: bool) -> Completion:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(
            prompt=PROMPTS[0], prompt_ids=[5], response_ids=ids, response=text, logprobs=None, truncated=truncated
        )

    first = [
        completion([7, 8, 9, 0], truncated=False),
        completion([7, 8], truncated=True),
        completion([0], truncated=False),
    ]
    second = [
        completion([4, 5, 6, 7, 8], truncated=True),
        completion([3, 0], truncated=False),
        completion([4, 5], truncated=True),
    ]
    a, b = cut_to_equal_length(first, second, tokenizer)
    assert ids(a) == [[7, 8, 9], [7], []]
    assert ids(b) == [[4, 5, 6], [3], []]
    assert [c.response for c in a] == [tokenizer.decode(x) for x in ([7, 8, 9], [7], [])]
    assert ids(first) == [[7, 8, 9, 0], [7, 8], [0]]


def test_rewards_are_normalized(folders: dict[str, Path]) -> None:
    comparison = run(folders)
    lm = load_scalar_lm(folders["reward_model"], num_frozen_layers=0, dtype=FP32)
    for scored in (comparison.sft, comparison.ppo):
        for c, reward in zip(scored.completions, scored.rewards, strict=True):
            hidden = lm.model(torch.tensor([c.prompt_ids + c.response_ids])).last_hidden_state[0, -1]
            raw = (hidden @ lm.score.weight[0]).item()
            assert reward == pytest.approx((raw - 0.5) / 0.01, rel=1e-3, abs=1e-3)


def test_model_compared_with_itself_gives_identical_responses(folders: dict[str, Path]) -> None:
    comparison = run(folders | {"policy": folders["sft_model"]})
    assert ids(comparison.sft.completions) == ids(comparison.ppo.completions)
    assert comparison.sft.judge_scores == comparison.ppo.judge_scores
    assert comparison.kl == [0.0] * len(PROMPTS)


def test_same_seed_gives_same_comparison(folders: dict[str, Path]) -> None:
    a, b, c = (run(folders, seed=seed) for seed in (1, 1, 2))
    assert ids(a.ppo.completions) == ids(b.ppo.completions) != ids(c.ppo.completions)
    assert a.kl == b.kl


def test_results_do_not_depend_on_batch_size(folders: dict[str, Path]) -> None:
    a, b = run(folders, batch_size=2), run(folders, batch_size=64)
    assert ids(a.ppo.completions) == ids(b.ppo.completions)
    assert a.kl == pytest.approx(b.kl, abs=1e-4)


def test_kl_is_that_of_sampling_distribution(folders: dict[str, Path]) -> None:
    """The reference sums log-probs at the sampling temperature with plain transformers, one response at a time."""
    comparison = run(folders, temperature=0.5)
    lms = [AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("policy", "sft_model")]
    for c, kl in zip(comparison.ppo.completions, comparison.kl, strict=True):
        sums = []
        for lm in lms:
            with torch.no_grad():
                logits = lm(torch.tensor([c.prompt_ids + c.response_ids])).logits[0].double()
            logprobs = torch.log_softmax(logits / 0.5, dim=-1)
            sums.append(sum(logprobs[len(c.prompt_ids) - 1 + t, x].item() for t, x in enumerate(c.response_ids)))
        assert kl == pytest.approx(sums[0] - sums[1], abs=1e-3)


def test_frozen_layers_are_computed_once_with_same_kl(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a policy with the fine-tuned model's two lowest layers, the KL is the same with and without sharing."""
    trained = AutoModelForCausalLM.from_pretrained(folders["sft_model"])
    with torch.no_grad():
        for parameter in trained.model.layers[2:].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    save_model(trained, AutoTokenizer.from_pretrained(folders["sft_model"]), tmp_path / "policy", dtype=FP32)
    partly_frozen = folders | {"policy": tmp_path / "policy"}
    trunks: list[Actor] = []
    plain_trunk = Actor.trunk
    monkeypatch.setattr(Actor, "trunk", lambda self, batch: trunks.append(self) or plain_trunk(self, batch))
    plain, shared, not_shared = run(partly_frozen), run(partly_frozen, frozen=2), run(folders, frozen=2)
    assert shared.kl == pytest.approx(plain.kl, abs=1e-4)
    assert min(map(abs, plain.kl)) > 1e-3  # the KL is not trivially 0
    assert not_shared.kl == pytest.approx(run(folders).kl, abs=1e-4)  # different layers are not shared
    with_frozen = [actor for actor in trunks if actor.num_frozen_layers]
    assert len(with_frozen) == 1  # one batch, one pass through the frozen layers


def test_kl_excludes_masked_stop_tokens(folders: dict[str, Path]) -> None:
    actors = [
        Actor(load_causal_lm(folders[name], num_frozen_layers=0, dtype=FP32), num_frozen_layers=0, dtype=FP32)
        for name in ("policy", "sft_model")
    ]
    completions = run(folders, min_new_tokens=5).ppo.completions
    unmasked, masked = (
        sequence_kl(*actors, completions, distribution, CPU)
        for distribution in (SamplingDistribution(), SamplingDistribution(min_new_tokens=5, stop_ids=(0,)))
    )
    assert all(a != b for a, b in zip(unmasked, masked, strict=True))


def test_reward_model_without_normalization_is_rejected(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["reward_model"], tmp_path / "raw")
    config = tmp_path / "raw" / "config.json"
    config.write_text(config.read_text().replace("reward_mean", "mean_of_rewards"))
    with pytest.raises(Exception, match="lacks reward_mean and reward_std"):
        run(folders | {"reward_model": tmp_path / "raw"})
