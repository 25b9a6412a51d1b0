import math
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import components.evaluation.compare as compare_module
import components.rlhf.models.actor as actor_module
from components.evaluation.compare import Comparison, compare, cut_to_equal_length, sequence_kl
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.config.model import ModelConfig, SamplingConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.models.actor import Actor, SamplingDistribution
from components.rlhf.models.loading import load_causal_lm, load_scalar_lm
from components.rlhf.models.saving import save_model
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from tests.rlhf.rollout.test_controls import slow_probabilities
from tests.support.evaluation_cases import make_trained
from tests.support.tiny_model import make_tiny_model
from tests.support.wordy_tokenizer import make_wordy_tokenizer

PROMPTS = [Prompt(prompt=text, id=str(i)) for i, text in enumerate(["It is", "We", "A film that", "So", "It", "One"])]
CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture(scope="module")
def folders(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of one comparison; the policy is an unrelated model."""
    root = tmp_path_factory.mktemp("compare")
    reward = load_scalar_lm(tiny_model, num_frozen_layers=0, dtype=FP32, seed=1)
    reward.config.reward_mean, reward.config.reward_std = 0.5, 0.01
    save_model(reward, AutoTokenizer.from_pretrained(tiny_model), root / "reward", dtype=FP32)
    return {
        "sft_model": tiny_model,
        "policy": make_tiny_model(root / "policy", seed=5),
        "reward_model": root / "reward",
    }


def run(
    folders: dict[str, Path],
    *,
    seed: int = 0,
    frozen: int = 0,
    num_samples: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    **sampling: Any,
) -> Comparison:
    stage = EvaluationStageConfig(
        model=ModelConfig(precision=precision, num_frozen_layers=frozen),
        evaluation=EvaluationConfig(num_samples=num_samples),
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
    assert comparison.groups == list(range(len(PROMPTS)))
    for responses in (comparison.sft, comparison.policy):
        assert [c.prompt for c in responses.completions] == [c.prompt for c in responses.cut] == PROMPTS
        assert len(responses.rewards) == len(PROMPTS)
    assert len(comparison.kl) == len(comparison.exact_kl) == len(PROMPTS)
    assert ids(comparison.sft.completions) != ids(comparison.policy.completions)


def test_several_samples_of_a_prompt_are_consecutive_rows(folders: dict[str, Path]) -> None:
    comparison = run(folders, num_samples=3, temperature=2.0, max_new_tokens=8)
    assert comparison.groups == [i for i in range(len(PROMPTS)) for _ in range(3)]
    expected = [prompt for prompt in PROMPTS for _ in range(3)]
    assert comparison.prompts == expected
    for responses in (comparison.sft, comparison.policy):
        assert [c.prompt for c in responses.completions] == [c.prompt for c in responses.cut] == expected
        texts = [tuple(c.response_ids) for c in responses.completions]
        assert all(len(set(texts[i : i + 3])) == 3 for i in range(0, len(texts), 3))
    assert len(comparison.kl) == len(comparison.exact_kl) == len(comparison.policy.rewards) == 3 * len(PROMPTS)


def test_both_models_get_the_same_seed_for_a_row_and_rows_different_ones(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[Prompt], list[int]]] = []
    plain = HfRolloutEngine.generate

    def generate(self: HfRolloutEngine, prompts: list[Prompt], sampling: SamplingConfig, seeds: list[int]) -> Any:
        calls.append((list(prompts), list(seeds)))
        return plain(self, prompts, sampling, seeds)

    monkeypatch.setattr(HfRolloutEngine, "generate", generate)
    run(folders, num_samples=3, batch_size=4)
    assert [len(seeds) for _, seeds in calls] == [4, 4, 4, 4, 2] * 2
    assert calls[:5] == calls[5:]
    seeds = [seed for _, batch in calls[:5] for seed in batch]
    assert len(set(seeds)) == 3 * len(PROMPTS)
    assert [p for batch, _ in calls[:5] for p in batch] == [p for p in PROMPTS for _ in range(3)]
    calls.clear()
    run(folders, num_samples=3, batch_size=64, seed=1)
    assert not set(calls[0][1]) & set(seeds)


def test_cut_responses_have_the_shorter_length(folders: dict[str, Path]) -> None:
    comparison = run(folders, max_new_tokens=100, temperature=0.7, num_samples=10, batch_size=64)
    tokenizer = AutoTokenizer.from_pretrained(folders["sft_model"])
    stop, different = 0, 0
    for i, (a, b) in enumerate(zip(comparison.sft.completions, comparison.policy.completions, strict=True)):
        response_ids = [[x for x in c.response_ids if x != stop] for c in (a, b)]  # a stop token is only at the end
        length = min(map(len, response_ids))
        different += max(map(len, response_ids)) > length
        for responses, own_ids in ((comparison.sft, response_ids[0]), (comparison.policy, response_ids[1])):
            assert responses.cut[i].response_ids == own_ids[:length]
            assert responses.cut[i].response == tokenizer.decode(own_ids[:length])
    assert different


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
    a, b = cut_to_equal_length(first, second, tokenizer, (0,))
    assert ids(a) == [[7, 8, 9], [7], []]
    assert ids(b) == [[4, 5, 6], [3], []]
    assert [c.response for c in a] == [tokenizer.decode(x) for x in ([7, 8, 9], [7], [])]
    assert ids(first) == [[7, 8, 9, 0], [7, 8], [0]]


def test_cut_to_equal_length_drops_stop_strings(folders: dict[str, Path]) -> None:
    """Without the tokens that only belong to the stop string, and without the rest of one that the string begins in."""
    tokenizer = AutoTokenizer.from_pretrained(folders["sft_model"])

    def ended(text: str, response: str) -> Completion:
        found = tokenizer(text)["input_ids"]
        return Completion(
            prompt=PROMPTS[0], prompt_ids=[5], response_ids=found, response=response, logprobs=None, truncated=False
        )

    first = [ended("good film###", "good film"), ended("good film###", "good film"), ended("###", "")]
    second = [ended("a film of length##", "a film of length"), ended("so##", "so"), ended("so##", "so")]
    a, b = cut_to_equal_length(first, second, tokenizer, (0,))
    assert [c.response for c in a] == ["good film", "go", ""]
    assert [c.response for c in b] == ["a film of", "so", ""]
    assert [len(c.response_ids) for c in a] == [len(c.response_ids) for c in b] == [9, 2, 0]


def test_cut_of_a_token_in_which_the_stop_string_begins() -> None:
    tokenizer = make_wordy_tokenizer()
    named = {tokenizer.decode([number]): number for number in range(len(tokenizer))}
    response_ids = [named["a"], named["xENDy"]]
    whole = Completion(
        prompt=PROMPTS[0], prompt_ids=[5], response_ids=response_ids, response="ax", logprobs=None, truncated=False
    )
    a, b = cut_to_equal_length([whole], [whole], tokenizer, (0,))
    assert ids(a) == ids(b) == [response_ids]
    assert a[0].response == "ax"


CONTROLS: list[dict[str, Any]] = [
    {"top_p": 0.6, "temperature": 1.5},
    {"top_k": 4},
    {"min_p": 0.3},
    {"repetition_penalty": 1.5},
    {"top_p": 0.7, "top_k": 20, "min_p": 0.05, "repetition_penalty": 0.7, "min_new_tokens": 2},
]


@pytest.mark.parametrize("controls", CONTROLS, ids=lambda controls: " ".join(controls))
def test_kl_of_controlled_sampling_sums_the_log_ratio_and_its_mean(
    folders: dict[str, Path], controls: dict[str, Any]
) -> None:
    """The reference goes token by token, with plain transformers."""
    comparison, how = run(folders, num_samples=2, **controls), SamplingConfig(max_new_tokens=5, **controls)
    lms = [AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("policy", "sft_model")]
    for c, kl, exact in zip(comparison.policy.completions, comparison.kl, comparison.exact_kl, strict=True):
        all_ids, start = c.prompt_ids + c.response_ids, len(c.prompt_ids)
        with torch.no_grad():
            rows = [lm(torch.tensor([all_ids])).logits[0] for lm in lms]
        ratios, means = 0.0, 0.0
        for t, token in enumerate(c.response_ids):
            place = (all_ids[: start + t], t, how, (0,))
            ours, theirs = (slow_probabilities(logits[start + t - 1], *place) for logits in rows)
            plain = slow_probabilities(rows[1][start + t - 1], *place, truncate=False)
            inside = plain[theirs > 0].sum()
            of_token = torch.where(theirs > 0, theirs, plain / (inside + plain))
            ratios += (ours[token] / of_token[token]).log().item()
            means += torch.where(ours > 0, ours * (ours / of_token).log(), 0).sum().item()
        assert kl == pytest.approx(ratios, abs=1e-3)
        assert exact == pytest.approx(means, abs=1e-3)


@pytest.mark.parametrize("controls", CONTROLS, ids=lambda controls: " ".join(controls))
def test_kl_of_a_model_to_itself_is_0_with_controls(folders: dict[str, Path], controls: dict[str, Any]) -> None:
    comparison = run(folders | {"policy": folders["sft_model"]}, **controls)
    assert comparison.kl == comparison.exact_kl == [0.0] * len(PROMPTS)


def test_rewards_are_normalized(folders: dict[str, Path]) -> None:
    comparison = run(folders)
    lm = load_scalar_lm(folders["reward_model"], num_frozen_layers=0, dtype=FP32)
    for scored in (comparison.sft, comparison.policy):
        for c, reward in zip(scored.completions, scored.rewards, strict=True):
            hidden = lm.model(torch.tensor([c.prompt_ids + c.response_ids])).last_hidden_state[0, -1]
            raw = (hidden @ lm.score.weight[0]).item()
            assert reward == pytest.approx((raw - 0.5) / 0.01, rel=1e-3, abs=1e-3)


def test_model_compared_with_itself_gives_identical_responses(folders: dict[str, Path]) -> None:
    comparison = run(folders | {"policy": folders["sft_model"]})
    assert ids(comparison.sft.completions) == ids(comparison.policy.completions)
    assert comparison.sft.rewards == comparison.policy.rewards
    assert comparison.kl == comparison.exact_kl == [0.0] * len(PROMPTS)


def test_same_seed_gives_same_comparison(folders: dict[str, Path]) -> None:
    a, b, c = (run(folders, seed=seed) for seed in (1, 1, 2))
    assert ids(a.policy.completions) == ids(b.policy.completions) != ids(c.policy.completions)
    assert a.kl == b.kl
    assert a.exact_kl == b.exact_kl


def test_results_do_not_depend_on_batch_size(folders: dict[str, Path]) -> None:
    a, b = run(folders, batch_size=2), run(folders, batch_size=64)
    assert ids(a.policy.completions) == ids(b.policy.completions)
    assert a.kl == pytest.approx(b.kl, abs=1e-4)
    assert a.exact_kl == pytest.approx(b.exact_kl, abs=1e-4)


@pytest.mark.parametrize("min_new_tokens", [0, 3])
def test_kl_is_that_of_sampling_distribution(folders: dict[str, Path], min_new_tokens: int) -> None:
    """The reference sums over tokens, with plain transformers, one response at a time."""
    comparison = run(folders, num_samples=3, temperature=0.5, min_new_tokens=min_new_tokens)
    lms = [AutoModelForCausalLM.from_pretrained(folders[name]).eval() for name in ("policy", "sft_model")]
    stop = 0
    for c, kl, exact in zip(comparison.policy.completions, comparison.kl, comparison.exact_kl, strict=True):
        logprobs = []
        for lm in lms:
            with torch.no_grad():
                logits = (
                    lm(torch.tensor([c.prompt_ids + c.response_ids])).logits[0, len(c.prompt_ids) - 1 : -1].double()
                )
            logits[:min_new_tokens, stop] = -1e9
            logprobs.append(torch.log_softmax(logits / 0.5, dim=-1))
        p, q = logprobs
        assert kl == pytest.approx(sum((p - q)[t, x].item() for t, x in enumerate(c.response_ids)), abs=1e-3)
        assert exact == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-3)
    assert min(comparison.exact_kl) > 0


@pytest.mark.parametrize("controls", [{}, {"top_p": 0.7}], ids=["plain", "top_p"])
def test_both_estimates_of_the_kl_have_the_same_mean(folders: dict[str, Path], controls: dict[str, Any]) -> None:
    """Up to their sampling error: of 240 responses, whose exact KL varies less."""
    comparison = run(folders, num_samples=40, batch_size=120, **controls)
    kl, exact = torch.tensor(comparison.kl), torch.tensor(comparison.exact_kl)
    gaps = kl - exact
    assert abs(gaps.mean().item()) < 4 * gaps.std().item() / len(gaps) ** 0.5
    assert exact.std() < kl.std()
    assert controls or exact.min() > 0


def test_pieces_of_logits_do_not_change_the_kl(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = run(folders)
    vocab_size = AutoModelForCausalLM.from_pretrained(folders["sft_model"]).config.vocab_size
    monkeypatch.setattr(actor_module, "MAX_LOGITS", 3 * vocab_size)
    pieces = run(folders)
    assert pieces.kl == pytest.approx(plain.kl, abs=1e-5)
    assert pieces.exact_kl == pytest.approx(plain.exact_kl, abs=1e-5)


def test_rows_keep_their_order_in_several_batches(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses are grouped by length for the passes of the models."""
    plain = run(folders, max_new_tokens=12, temperature=3.0)
    monkeypatch.setattr(compare_module, "MICROBATCH_TOKENS", 16)
    small = run(folders, max_new_tokens=12, temperature=3.0)
    assert small.kl == pytest.approx(plain.kl, abs=1e-4)
    assert small.exact_kl == pytest.approx(plain.exact_kl, abs=1e-4)
    assert small.policy.rewards == pytest.approx(plain.policy.rewards, abs=1e-2)


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
    assert shared.exact_kl == pytest.approx(plain.exact_kl, abs=1e-4)
    assert min(map(abs, plain.kl)) > 1e-3  # the KL is not trivially 0
    separate = run(folders)
    assert not_shared.kl == pytest.approx(separate.kl, abs=1e-4)  # different layers are not shared
    assert not_shared.exact_kl == pytest.approx(separate.exact_kl, abs=1e-4)
    with_frozen = [actor for actor in trunks if actor.num_frozen_layers]
    assert len(with_frozen) == 2  # one batch and the probe of the engine: one pass each through the frozen layers


def test_kl_excludes_masked_stop_tokens(folders: dict[str, Path]) -> None:
    actors = [
        Actor(load_causal_lm(folders[name], num_frozen_layers=0, dtype=FP32), num_frozen_layers=0, dtype=FP32)
        for name in ("policy", "sft_model")
    ]
    completions = run(folders, min_new_tokens=5).policy.completions
    unmasked, masked = (
        sequence_kl(*actors, completions, distribution, CPU)
        for distribution in (SamplingDistribution(), SamplingDistribution(min_new_tokens=5, stop_ids=(0,)))
    )
    for a, b in zip(unmasked, masked, strict=True):  # the log-ratios, and the exact KL
        assert all(x != y for x, y in zip(a, b, strict=True))
        assert all(map(math.isfinite, a + b))


def test_reward_model_without_normalization_is_rejected(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["reward_model"], tmp_path / "raw")
    config = tmp_path / "raw" / "config.json"
    config.write_text(config.read_text().replace("reward_mean", "mean_of_rewards"))
    with pytest.raises(Exception, match="lacks reward_mean and reward_std"):
        run(folders | {"reward_model": tmp_path / "raw"})


@pytest.mark.parametrize("step", [1e-3, 1e-1])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_policy_that_the_engine_did_not_load_is_detected(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: Literal["fp32", "bf16"],
    step: float,
) -> None:
    dtype = FP32 if precision == "fp32" else torch.bfloat16
    policy = make_trained(folders["sft_model"], tmp_path / "policy", step=step, dtype=dtype)
    run(folders | {"policy": policy}, precision=precision)
    monkeypatch.setattr(HfRolloutEngine, "load", lambda self, folder: 1)
    with pytest.raises(InputError, match="did not (load|sample from) the PPO model"):
        run(folders | {"policy": policy}, precision=precision)
