import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from components.evaluation.compare import Comparison
from components.evaluation.report import as_html, as_markdown, choose_samples
from components.evaluation.samples import save_comparison
from components.evaluation.verdict import Decision, decide, summarize
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.text.comparison_table import comparison_rows
from tests.support.comparisons import comparison_of

# Gains of -20, -19, ..., 19 in shuffled order.
GAINS = [float((17 * i) % 40 - 20) for i in range(40)]


def comparison_of_40_prompts() -> Comparison:
    return comparison_of([100.0] * 40, [100.0 + gain for gain in GAINS])


def numbers_of(comparison: Comparison) -> dict[str, float]:
    return summarize(
        comparison, EvaluationConfig(num_bootstrap=200), accuracy={"judge": 0.811, "reward_model": 0.722}, seed=0
    )


VALIDATION_PASSES = [
    {"iteration": i, "num_rollouts": 64 * i, "reward": 0.1 * i, "judge_score": 0.2, "kl": 0.5 * i, "length": 9.0, "eos_rate": 0.5}
    for i in (0.0, 4.0, 8.0)
]  # fmt: skip


def page_of(comparison: Comparison, training: list[dict[str, float]] = VALIDATION_PASSES) -> str:
    numbers = numbers_of(comparison)
    return as_html(comparison, numbers, decide(numbers, GateConfig()), training, seed=0)


def test_samples_are_extremes_and_random_ones() -> None:
    groups = choose_samples(comparison_of_40_prompts(), seed=3)
    assert list(groups) == ["Largest gains", "Largest losses", "At random"]
    assert [s["gain"] for s in groups["Largest gains"]] == [19, 18, 17, 16, 15]
    assert [s["gain"] for s in groups["Largest losses"]] == [-20, -19, -18, -17, -16]
    random_gains = [s["gain"] for s in groups["At random"]]
    assert len(set(random_gains)) == 10
    assert all(-16 < gain < 15 for gain in random_gains)  # none is in two groups


def test_random_samples_depend_on_seed() -> None:
    a, b, c = (choose_samples(comparison_of_40_prompts(), seed=seed)["At random"] for seed in (1, 1, 2))
    assert a == b != c


def test_sample_has_prompt_and_both_responses() -> None:
    best = choose_samples(comparison_of_40_prompts(), seed=0)["Largest gains"][0]
    i = GAINS.index(19.0)
    assert best == {"prompt": f"prompt {i}", "sft": f"sft response {i}", "ppo": f"ppo response {i}", "gain": 19.0}


@pytest.mark.parametrize("size", [1, 4, 10, 11])
def test_samples_of_few_prompts(size: int) -> None:
    groups = choose_samples(comparison_of([0.0] * size, [float(i) for i in range(size)]), seed=0)
    assert len(groups["Largest gains"]) == min(size, 5)
    assert len(groups["At random"]) == max(size - 10, 0)


def test_all_responses_are_saved(tmp_path: Path) -> None:
    c = comparison_of([1.0, 2.0], [3.0, 0.5], kl=[0.25, 0.5], ppo_ends=[(3, False), (6, True)])
    numbers = numbers_of(c)
    save_comparison(c, numbers, VALIDATION_PASSES, tmp_path)
    saved = (tmp_path / "training.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in saved] == VALIDATION_PASSES
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == numbers
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[1] == {
        "id": "heldout-1",
        "prompt": "prompt 1",
        "sft": {"response": "sft response 1", "num_tokens": 3, "truncated": False, "judge_score": 2.0, "reward": 1.0},
        "ppo": {
            "response": "ppo response 1",
            "num_tokens": 6,
            "truncated": True,
            "judge_score": 0.5,
            "reward": 0.25,
            "kl": 0.5,
        },
    }
    assert [row["id"] for row in rows] == ["heldout-0", "heldout-1"]


class TagCollector(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_is_self_contained() -> None:
    page = page_of(comparison_of_40_prompts())
    collector = TagCollector()
    collector.feed(page)
    assert not collector.seen & {"script", "link", "iframe", "object", "embed", "img"}
    assert not re.search(r"""(?:src|href|data)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)
    assert "svg" in collector.seen


def test_page_shows_decision_and_accuracies() -> None:
    collector = TagCollector()
    collector.feed(page_of(comparison_of_40_prompts()))
    text = " ".join(collector.text.split())
    assert "Rejected. win rate 0.4" in text
    assert "40 held-out prompts" in text
    assert "judge accuracy (held-out human pairs)81.1%" in text
    assert "reward model accuracy (held-out human pairs)72.2%" in text


def test_page_shows_training_curves_if_there_were_validation_passes() -> None:
    assert "Training curves" in page_of(comparison_of_40_prompts())
    assert page_of(comparison_of_40_prompts()).count("<svg") == 2
    assert "Training curves" not in page_of(comparison_of_40_prompts(), [])


def test_responses_are_escaped() -> None:
    c = comparison_of([0.0], [1.0])
    object.__setattr__(c.ppo.completions[0], "response", "<script>alert('& you')</script>")
    page = page_of(c)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_comparison_rows() -> None:
    rows = comparison_rows(numbers_of(comparison_of([0.0, 1.0], [1.0, 1.0], kl=[2.0, 4.0])))
    by_name = {row["name"]: (row["sft"], row["ppo"]) for row in rows}
    assert by_name["win rate (judge), [95% interval]"] == ("", "0.750 [0.500, 1.000]")
    assert by_name["win rate at equal length and ending (2 prompts)"] == ("", "0.750 [0.500, 1.000]")
    assert by_name["judge score"] == ("0.500", "1.000")
    assert by_name["KL to SFT (nats per response)"] == ("0", "3.000 [2.000, 4.000]")
    assert by_name["length (tokens)"] == ("3.0", "3.0")
    assert by_name["EOS rate"] == ("100.0%", "100.0%")


def test_markdown_summary() -> None:
    numbers = numbers_of(comparison_of([0.0, 1.0], [1.0, 1.0]))
    lines = as_markdown(numbers, Decision(decision="promote", reason="it is better")).splitlines()
    assert lines[0] == "# Promote"
    assert lines[2] == "it is better."
    assert "| judge score | 0.500 | 1.000 |" in lines
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(comparison_rows(numbers))
