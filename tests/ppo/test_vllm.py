"""PPO with rollouts from the real vLLM, on a CPU."""

from pathlib import Path
from typing import Any, Literal

import pytest

from components.rlhf.config.model import LoraConfig
from components.rlhf.text.errors import InputError
from tests.support.ppo_runs import PROMPTS, VALIDATION, config_of, make_reward_model, share_of_low_ids, trainer_of
from tests.support.tiny_model import make_tiny_model
from tests.support.training import NEVER, checkpoints_every_step

pytestmark = pytest.mark.vllm
RUN = {
    "num_iterations": 8,
    "num_epochs": 2,
    "minibatch": 64,
    "training": {"learning_rate": 1e-3, "schedule": "linear", "min_learning_rate_fraction": 0.0},
    "critic": {"learning_rate": 1e-2},
    "normalize_reward": False,
    "kl_coef": 0.01,
    "eval_every": 8,
}
SAMPLING = {"batch_size": 128, "max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An actor with a head size that vLLM supports on a CPU, and its reward model."""
    folder = tmp_path_factory.mktemp("vllm")
    make_reward_model(make_tiny_model(folder / "sft", seed=0, hidden_size=128), folder / "reward")
    return folder


def scores_of(folder: Path, engine: str, **changes: Any) -> list[float]:
    stage = config_of(**RUN, rollout={"engine": engine, "num_prompts": 128}, sampling=SAMPLING, **changes)
    trainer = trainer_of(stage, folder / "sft", folder / "reward", reward=lambda p, r: 3 * share_of_low_ids(p, r))
    try:
        history = trainer.train(PROMPTS, VALIDATION)
    finally:
        trainer.rollout.close()
    assert max(row["engine_gap/max"] for row in history) < 1e-4
    assert history[0]["actor/first_ratio_error"] == 0.0
    assert trainer.rollout.version == 8  # one sync per iteration, each checked with the probe
    return [row["score/mean"] for row in history]


@pytest.fixture(scope="module")
def vllm_scores(folder: Path) -> list[float]:
    return scores_of(folder, "vllm")


def test_ppo_with_vllm_learns_like_with_transformers(folder: Path, vllm_scores: list[float]) -> None:
    """The ends of training are means over three seeds: rounding, which differs between processors, soon leads to other samples."""
    hf_scores = scores_of(folder, "hf")
    # Three times the share of 4 tokens: a standard deviation of at most 0.75, so the mean of 128 rows has one of 0.07.
    assert hf_scores[0] == pytest.approx(vllm_scores[0], abs=0.2)
    runs = {"hf": [hf_scores], "vllm": [vllm_scores]}
    for engine, found in runs.items():
        found += [scores_of(folder, engine, seed=seed) for seed in (4, 5)]
    assert all(sum(scores[-3:]) / 3 > hf_scores[0] + 0.3 for found in runs.values() for scores in found)
    ends = [sum(sum(scores[-3:]) / 3 for scores in found) / 3 for found in runs.values()]
    assert ends[0] == pytest.approx(ends[1], abs=0.3)


def test_importance_correction_of_equal_engines_changes_nothing(folder: Path, vllm_scores: list[float]) -> None:
    assert scores_of(folder, "vllm", importance_clip=(0.5, 5.0)) == pytest.approx(vllm_scores, abs=0.3)


def test_failed_weight_sync_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.rlhf.rollout import vllm as module

    monkeypatch.setattr(module, "_pack_heads", lambda model: None)  # the effect of a plain reload of a tied head
    with pytest.raises(InputError, match=r"weights \(version 1\) do not match the trainer's"):
        scores_of(folder, "vllm")


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_ppo_with_adapters_sends_only_them(
    folder: Path, tmp_path: Path, quantization: Literal["nf4"] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = LoraConfig(rank=8, alpha=16.0, quantization=quantization)
    stage = config_of(lora=lora, frozen=1, num_iterations=3, rollout={"engine": "vllm"})
    history: list[dict[str, float]] = []
    for interrupt_at in (2, NEVER):  # the second resumes from the checkpoint of the first
        trainer = trainer_of(
            stage,
            folder / "sft",
            folder / "reward",
            checkpoints=checkpoints_every_step(tmp_path, "ppo"),
            interrupt_at=interrupt_at,
        )
        sent: list[set[str]] = []
        real = trainer.rollout.sync

        def sync(weights: Any, real: Any = real, sent: Any = sent) -> int:
            pairs = list(weights)
            sent.append({name for name, _ in pairs})
            return int(real(pairs))

        trainer.rollout.sync = sync  # type: ignore[method-assign]
        try:
            history = trainer.train(PROMPTS, [])
        except KeyboardInterrupt:
            assert interrupt_at == 2
        finally:
            trainer.rollout.close()
        kinds = [{".lora_" in name for name in names} for names in sent]
        assert kinds[0] == ({True} if quantization is None else {True, False})  # a base in 4 bits is sent once
        assert all(kind == {True} for kind in kinds[1:])
    assert len(history) == 3
    assert max(row["engine_gap/max"] for row in history) < 1e-4
    assert history[-1]["kl/sequence"] != 0.0
    assert "weight sync: adapters only" in capsys.readouterr().err
