"""The evaluation of a second policy, which takes the responses of the SFT model from that of the first."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from components.evaluation import sampling
from components.evaluation.compare import Comparison, compare
from components.evaluation.measure import require_method
from components.evaluation.report import Background, as_html, as_markdown
from components.evaluation.rival import SAMPLED_WITH, Rival, open_rival, outcome_of, sampling_digest, save_responses
from components.evaluation.side_by_side import compare_policies, training_costs
from components.evaluation.verdict import Decision, decide, summarize
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationConfig, EvaluationStageConfig, GateConfig
from components.rlhf.data.records import Completion
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.comparison_table import method_of
from components.rlhf.text.errors import InputError
from components.rlhf.text.progress import Progress
from tests.support.comparisons import comparison_of, judged_of
from tests.support.evaluation_cases import PROMPTS, config_of, make_trained
from tests.support.tiny_model import make_tiny_model

PARENTS = {name: f"digest of {name}" for name in ("sft_model", "prompts", "judge", "policy_model")}
INPUTS = {name: Manifest(kind="prompts", files={}, parents={"x": name}) for name in PARENTS}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models of both comparisons; DPO's policy is not far from the SFT model."""
    root = tmp_path_factory.mktemp("rivals")
    return {
        "sft_model": tiny_model,
        "policy": make_tiny_model(root / "ppo", seed=5),
        "dpo": make_trained(tiny_model, root / "dpo", step=0.05, dtype=torch.float32),
    }


def config(method: str, **changes: Any) -> EvaluationStageConfig:
    return config_of(**changes).model_copy(update={"method": method})


def compared(models: dict[str, Path], method: str, sft: Any = None) -> Comparison:
    folders = {"sft_model": models["sft_model"], "policy": models["policy" if method == "ppo" else "dpo"]}
    progress = Progress("evaluation", silent=True)
    return compare(config(method), PROMPTS, **folders, reward_model=None, progress=progress, sft_completions=sft)


@pytest.fixture(scope="module")
def first(models: dict[str, Path]) -> Comparison:
    return compared(models, "ppo")


def manifest_of(*, parents: dict[str, str] | None = None, **facts: Any) -> Manifest:
    found = {"method": "ppo", "decision": "promote", SAMPLED_WITH: sampling_digest(config("ppo"))} | facts
    own = {role: manifest.digest for role, manifest in INPUTS.items()} | (parents or {})
    return Manifest(kind="evaluation", files={}, parents=own, facts=found, measurements={"policy/seconds": 61.0})


def saved(comparison: Comparison, folder: Path) -> Path:
    """The files of an evaluation that the other one reads."""
    save_responses(comparison, 0, folder)
    numbers = {f"length_{comparison.method}": 5.0, "win_rate": 0.75, "kl": 2.0}
    (folder / "evaluation.json").write_text(json.dumps(numbers))
    return folder


def opened(folder: Path, manifest: Manifest | None = None, own: EvaluationStageConfig | None = None) -> Rival:
    return open_rival(folder, manifest or manifest_of(), INPUTS, own or config("dpo"), PROMPTS)


def plain_rows(completions: list[Completion]) -> list[Completion]:
    """Without what depends on how often the engine has loaded weights."""
    return [replace(c, logprobs=None, weight_version=0) for c in completions]


def test_responses_of_the_sft_model_are_those_that_would_be_sampled_again(
    models: dict[str, Path], first: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rival = opened(saved(first, tmp_path))
    assert (rival.method, rival.outcome.win_rate, rival.outcome.kl) == ("ppo", 0.75, 2.0)
    fresh = compared(models, "dpo")
    assert [c.response_ids for c in fresh.sft.completions] == [c.response_ids for c in first.sft.completions]
    loaded: list[Path] = []
    sampled: list[int] = []
    plain, generate = HfRolloutEngine.load, HfRolloutEngine.generate
    monkeypatch.setattr(HfRolloutEngine, "load", lambda self, folder: (loaded.append(folder), plain(self, folder))[1])
    monkeypatch.setattr(
        HfRolloutEngine, "generate", lambda self, p, *rest: (sampled.append(len(p)), generate(self, p, *rest))[1]
    )
    reused = compared(models, "dpo", rival.sft)
    assert loaded == [] and sum(sampled) == 2 * len(PROMPTS)  # of the policy alone
    assert reused.method == "dpo"
    for side in ("sft", "policy"):
        a, b = getattr(reused, side), getattr(fresh, side)
        for name in ("completions", "cut"):
            assert plain_rows(getattr(a, name)) == plain_rows(getattr(b, name))
    assert (reused.kl, reused.exact_kl) == (pytest.approx(fresh.kl, rel=1e-5), pytest.approx(fresh.exact_kl, rel=1e-5))
    assert rival.responses == [c.response for c in first.policy.completions]


def test_policy_that_was_not_sampled_from_is_detected_with_a_rival_too(
    models: dict[str, Path], first: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = sampling.create_rollout_engine
    monkeypatch.setattr(
        sampling, "create_rollout_engine", lambda _, *rest, **more: create(models["sft_model"], *rest, **more)
    )
    with pytest.raises(InputError, match="did not sample from the DPO model"):
        compared(models, "dpo", first.sft.completions)


Change = Callable[[Path], tuple[Manifest | None, EvaluationStageConfig | None]]


def _lines(change: Callable[[list[dict[str, Any]]], object]) -> Change:
    def apply(folder: Path) -> tuple[None, None]:
        path = folder / "sft_responses.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        change(rows)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return None, None

    return apply


def _numbers(text: str) -> Change:
    def apply(folder: Path) -> tuple[None, None]:
        (folder / "evaluation.json").write_text(text)
        return None, None

    return apply


REFUSED: dict[str, tuple[Change, str]] = {
    "another SFT model": (lambda _: (manifest_of(parents={"sft_model": "x"}), None), "with other SFT model"),
    "other prompts": (lambda _: (manifest_of(parents={"prompts": "x"}), None), "with other prompts"),
    "another judge": (lambda _: (manifest_of(parents={"judge": "x"}), None), "with other judges"),
    "another seed": (lambda _: (None, config("dpo").model_copy(update={"seed": 1})), "sampled with other settings"),
    "another temperature": (
        lambda _: (None, config("dpo", sampling={"temperature": 0.5})),
        "sampled with other settings",
    ),
    "an evaluation of the same method": (lambda _: (None, config("ppo")), "and this one too"),
    "the numbers of another method": (_numbers('{"length_dpo": 1.0, "kl": 1.0}'), "its numbers are of another one"),
    "an evaluation without its method": (lambda _: (manifest_of(method="sft"), None), "of no known method"),
    "no numbers": (_numbers("[]"), "has no numbers of an evaluation"),
    "a number that is none": (_numbers('{"kl": "x"}'), "has no numbers of an evaluation"),
    "a missing row": (_lines(lambda rows: rows.pop()), "responses to other prompts or seeds"),
    "rows in another order": (_lines(lambda rows: rows.reverse()), "responses to other prompts or seeds"),
    "a row with another seed": (_lines(lambda rows: rows[3].update(seed=7)), "responses to other prompts or seeds"),
    "a row with a missing key": (_lines(lambda rows: rows[0].pop("seed")), "'seed' is missing"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_evaluation_that_cannot_be_compared_is_refused(
    first: Comparison, tmp_path: Path, change: Change, message: str
) -> None:
    folder = saved(first, tmp_path)
    opened(folder)
    manifest, own = change(folder)
    with pytest.raises(InputError, match=message):
        opened(folder, manifest, own)


@pytest.mark.parametrize(("method", "parent"), [("ppo", "prompts"), ("dpo", "preferences")])
def test_policy_of_another_method_is_refused(method: Any, parent: str) -> None:
    require_method(method, Manifest(kind="policy_model", files={}, parents={parent: "x"}), Path("p"))
    other = {"prompts": "preferences", "preferences": "prompts"}[parent]
    with pytest.raises(InputError, match="was trained by (PPO|DPO), and the settings say"):
        require_method(method, Manifest(kind="policy_model", files={}, parents={other: "x"}), Path("p"))


# --- side by side

TEXTS = {"sft": ["a b a b", "c d"], "ppo": ["a b c d", "c e"], "dpo": ["a a a a a", "c d e"]}


def with_texts(comparison: Comparison, sft: list[str], policy: list[str]) -> Comparison:
    def side(responses: Any, texts: list[str]) -> Any:
        own = [replace(c, response=text) for c, text in zip(responses.completions, texts, strict=True)]
        return replace(responses, completions=own)

    return replace(comparison, sft=side(comparison.sft, sft), policy=side(comparison.policy, policy))


def numbers_of(comparison: Comparison, scores: list[float]) -> dict[str, float]:
    judge = judged_of([0.0] * len(scores), scores)
    return summarize(comparison, [judge], EvaluationConfig(num_bootstrap=50), reward_accuracy=None, seed=0)


@pytest.fixture(scope="module")
def both() -> Any:
    """DPO wins both rows at KL 3, PPO one of two at KL 1; the gate promotes DPO alone."""
    ppo = with_texts(comparison_of([0.0, 0.0], [1.0, -1.0], kl=[1.0, 1.0]), TEXTS["sft"], TEXTS["ppo"])
    dpo = replace(comparison_of([0.0, 0.0], [1.0, 1.0], kl=[3.0, 3.0]), method="dpo")
    dpo = with_texts(dpo, TEXTS["sft"], TEXTS["dpo"])
    first, numbers = numbers_of(ppo, [1.0, -1.0]) | {"judge_cost": 1.5}, numbers_of(dpo, [1.0, 1.0])
    costs = training_costs({"seconds": 3599.6, "memory/peak_gib": 2.5, "memory/planned_gib": 3.0})
    rival = Rival(
        method="ppo",
        outcome=outcome_of("ppo", "reject", first),
        numbers=first,
        sft=ppo.sft.completions,
        responses=TEXTS["ppo"],
        measurements={"policy/seconds": 61.0, "seconds": 7.0},
    )
    verdict = Decision(decision="promote", reason="it is better")
    return dpo, numbers, verdict, compare_policies(dpo, numbers, verdict, costs, rival)


def test_numbers_of_dpo_have_its_name(both: Any) -> None:
    _, numbers, _, _ = both
    assert {name for name in numbers if "ppo" in name} == set()
    assert {"length_dpo", "reward_dpo", "judge_score_dpo", "eos_rate_dpo", "distinct2_dpo"} <= set(numbers)
    assert (method_of(numbers), method_of({"length_ppo": 1.0}), method_of({})) == ("dpo", "ppo", "ppo")


def test_both_policies_are_side_by_side(both: Any) -> None:
    _, _, _, table = both
    assert table.head == ["SFT", "PPO", "DPO"]
    rows = {name: cells for name, *cells in table.rows}
    assert rows["gate"] == ["", "reject", "promote"]
    assert rows["win rate (judge), [95% interval]"][1].startswith("0.500 [")
    assert rows["win rate (judge), [95% interval]"][2] == "1.000 [1.000, 1.000]"
    assert rows["KL to SFT (nats per response)"] == ["0", "1.000 [1.000, 1.000]", "3.000 [3.000, 3.000]"]
    assert rows["length (tokens)"] == ["3.0", "3.0", "3.0"]
    # All cut to 4 and 2 words: ab ba ab, cd is 3 of 4; ab bc cd, ce is 4 of 4; aa aa aa, cd is 2 of 4.
    assert rows["distinct-2 at equal length of all"] == ["0.750", "1.000", "0.500"]
    assert "distinct-2 at equal length" not in rows
    assert rows["time of its training stage"] == ["", "1:01", "1:00:00"]
    assert rows["memory of a process of its training stage, GiB"] == ["", "", "2.50"]
    assert rows["cost of the judge's answers"] == ["", "1.50", ""]
    assert table.better.method == "dpo" and "because PPO's is rejected" in table.reason


def test_report_and_summary_name_the_method_and_show_both(both: Any) -> None:
    comparison, numbers, verdict, table = both
    judge = judged_of([0.0, 0.0], [1.0, 1.0])
    text = as_markdown(numbers, [judge], verdict, background=Background(both=table))
    assert "| | SFT | DPO |" in text and "## PPO and DPO side by side" in text
    assert "| gate |  | reject | promote |" in text
    assert "side by side" not in as_markdown(numbers, [judge], verdict)
    page = as_html(comparison, [judge], numbers, verdict, [], seed=0, background=Background(both=table))
    assert "<title>DPO vs. the fine-tuned model</title>" in page
    assert "PPO and DPO side by side" in page and '<th scope="row">gate</th>' in page
    assert "win rate of DPO" in page
    alone = as_html(comparison, [judge], numbers, verdict, [], seed=0)
    assert "PPO" not in alone


def test_gate_decides_on_the_numbers_of_dpo(both: Any) -> None:
    _, numbers, _, _ = both
    judge = judged_of([0.0, 0.0], [1.0, 1.0])
    assert decide(numbers, judge, GateConfig(min_prompts=1)).decision == "promote"
    assert decide(numbers, judge, GateConfig(min_prompts=1, max_kl=2.9)).decision == "reject"
