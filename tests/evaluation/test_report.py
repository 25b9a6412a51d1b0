import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from components.evaluation.better import Outcome
from components.evaluation.cards import list_cards
from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged
from components.evaluation.report import Background, as_html, as_markdown, as_picture
from components.evaluation.rival import Rival
from components.evaluation.samples import save_comparison
from components.evaluation.tables import judge_rows, stage_costs
from components.evaluation.verdict import Decision, decide, summarize
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.data.records import Prompt
from components.rlhf.page.costs import StageCost
from components.rlhf.text.comparison_table import comparison_rows
from tests.support.comparisons import CHANCE, both_of, comparison_of, judged_of, pairwise_of
from tests.support.html_page import check_structure, parse

# Gains of -20, -19, ..., 19 in shuffled order.
GAINS = [float((17 * i) % 40 - 20) for i in range(40)]
NAN = float("nan")


def forty_prompts() -> tuple[Comparison, Judged]:
    return both_of([100.0] * 40, [100.0 + gain for gain in GAINS])


def numbers_of(comparison: Comparison, *judges: Judged) -> dict[str, float]:
    return summarize(comparison, judges, EvaluationConfig(num_bootstrap=200), reward_accuracy=0.722, seed=0)


VALIDATION_PASSES = [
    {
        "iteration": i, "num_rollouts": 64 * i, "reward": 0.1 * i, "judge_score": 0.2 + 0.1 * (i > 0), "kl": 0.5 * i, "length": 9.0,
        "eos_rate": 0.5, "reward_gain": 0.2 * i, "judge_gain": 1.0 * (i > 0),
    }
    for i in (0.0, 4.0, 8.0)
]  # fmt: skip


def page_of(comparison: Comparison, *judges: Judged, training: list[dict[str, float]] = VALIDATION_PASSES) -> str:
    numbers = numbers_of(comparison, *judges)
    return as_html(comparison, judges, numbers, decide(numbers, judges[0], GateConfig()), training, seed=0)


# The artifact.


def read_lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_all_responses_are_saved(tmp_path: Path) -> None:
    scores = [1.0, 2.0], [3.0, 0.5]
    c = comparison_of(*scores, kl=[0.25, 0.5], exact_kl=[0.125, 0.75], ppo_ends=[(3, False), (6, True)])
    judge = judged_of(*scores)
    numbers = numbers_of(c, judge)
    save_comparison(c, [judge], numbers, VALIDATION_PASSES, tmp_path)
    assert read_lines(tmp_path / "training.jsonl") == VALIDATION_PASSES
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8")) == numbers
    rows = read_lines(tmp_path / "samples.jsonl")
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
            "kl_exact": 0.75,
        },
        "wins": {"linear": 0.0},
        "consistent": {},
    }
    assert [row["id"] for row in rows] == ["heldout-0", "heldout-1"]


def test_answers_of_all_judges_are_saved(tmp_path: Path) -> None:
    """null is no answer. Only judges that read two responses at a time have an order to be consistent in."""
    c = comparison_of([0.0] * 3, [0.0] * 3, groups=[0, 0, 1])
    judges = [
        pairwise_of([1.0, NAN, 0.75], consistent=[True, False, False], name="gpt"),
        judged_of([1.0, 2.0, 3.0], [3.0, 2.0, 1.0], name="people"),
        pairwise_of([NAN] * 3, name="down", error="it is down"),
    ]
    save_comparison(c, judges, {}, [], tmp_path)
    assert "NaN" not in (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    rows = read_lines(tmp_path / "samples.jsonl")
    assert [row["id"] for row in rows] == ["heldout-0", "heldout-0", "heldout-1"]
    assert [row["wins"] for row in rows] == [
        {"gpt": 1.0, "people": 1.0, "down": None},
        {"gpt": None, "people": 0.5, "down": None},
        {"gpt": 0.75, "people": 0.0, "down": None},
    ]
    assert [row["consistent"] for row in rows] == [{"gpt": True}, {"gpt": False}, {"gpt": False}]
    for side, scores in (("sft", [1.0, 2.0, 3.0]), ("ppo", [3.0, 2.0, 1.0])):
        assert [row[side]["judge_score_people"] for row in rows] == scores  # type: ignore[index]
        assert not [row for row in rows if "judge_score" in row[side]]  # type: ignore[operator]
    assert (tmp_path / "training.jsonl").read_text(encoding="utf-8") == ""


# The page.


def text_of(page: str) -> str:
    return parse(page).text


def test_page_is_self_contained_and_well_formed() -> None:
    page = page_of(*forty_prompts())
    root = parse(page)
    check_structure(root)
    assert not {element.tag for element in root.all()} & {"link", "iframe", "object", "embed", "img"}
    assert not re.search(r"""(?:src|href|data|action)\s*=\s*["'](?!#)|url\((?!#)|@import|https?:|//[a-z]""", page)
    (script,) = root.all("script")
    assert "src" not in script.attributes
    assert len(root.all("svg", role="img")) >= 7
    assert not [svg for svg in root.all("svg", role="img") if not svg.attributes["aria-label"]]


def test_page_is_complete_without_its_script() -> None:
    root = parse(page_of(*forty_prompts()))
    hidden = [element for element in root.all() if "hidden" in element.attributes]
    assert {element.attributes["id"] for element in hidden} == {"tools", "flat", "more"}
    assert len(root.all("article")) == 40
    assert "prompt 1 prompt 0" in root.text  # its number, and its text
    assert "Search" in hidden[0].text


def test_page_has_the_verdict_first() -> None:
    root = parse(page_of(*both_of([0.0] * 40, [1.0] * 30 + [-1.0] * 10)))
    (main,) = root.all("main")
    verdict = main.all("section")[0]
    assert verdict.matches("", {"class_": "promote"})
    assert verdict.all(class_="number")[0].text == "0.750"
    assert re.search(r"0\.750 win rate over the fine-tuned model 95% interval 0\.[56]\d\d to 0\.[89]\d\d", verdict.text)
    assert verdict.all(class_="at")[0].attributes["style"] == "left:75.00%"


def test_page_shows_decision_and_accuracies() -> None:
    text = text_of(page_of(*forty_prompts()))
    assert "Rejected. win rate 0.4" in text
    assert "40 held-out prompts" in text
    assert "both models answered each with the same seed." in text
    assert "judge agreement with people (held-out pairs) 0.811 [0.750, 0.860]" in text
    assert "reward model accuracy (held-out human pairs) 72.2%" in text


def test_page_shows_the_number_of_samples() -> None:
    c, judge = forty_prompts()
    numbers = numbers_of(c, judge) | {"num_samples": 3}
    page = as_html(c, [judge], numbers, decide(numbers, judge, GateConfig()), [], seed=0)
    assert "both models answered each 3 times with the same seeds." in text_of(page)


def test_reports_say_which_policy_was_exported_and_what_the_guard_did() -> None:
    facts = {
        "kept_iteration": 4.0,
        "kept_reason": "the exported policy is the <best> one",
        "guard": "guard, iteration 6: it collapsed",
    }
    c, judge = forty_prompts()
    numbers = numbers_of(c, judge)
    verdict = decide(numbers, judge, GateConfig())
    plain, marked = (
        as_html(c, [judge], numbers, verdict, VALIDATION_PASSES, seed=0, background=Background(policy=f))
        for f in ({}, facts)
    )
    assert "<p>The exported policy is the &lt;best&gt; one.</p>" in marked
    assert "<p>Guard, iteration 6: it collapsed.</p>" in marked
    assert "exported policy is" not in plain
    lines = as_markdown(numbers, [judge], verdict, background=Background(policy=facts)).splitlines()
    assert lines[2:8:2] == [
        f"{verdict.reason}.",
        "The exported policy is the <best> one.",
        "Guard, iteration 6: it collapsed.",
    ]
    assert (plain.count('class="mark"'), marked.count('class="mark"')) == (0, 6)  # the curves, and the picture over KL


def test_page_shows_training_curves_if_there_were_validation_passes() -> None:
    assert "Training curves" in page_of(*forty_prompts())
    assert "Training curves" not in page_of(*forty_prompts(), training=[])
    root = parse(page_of(*forty_prompts()))
    table = next(table for table in root.all("table") if "Validation passes" in table.text)
    assert [cell.text for row in table.all("tr") for cell in row.all("th")][:8] == [
        "iteration", "responses trained on", "reward", "score of the first judge", "KL to SFT", "length", "EOS rate", "0",
    ]  # fmt: skip
    assert [cell.text for cell in table.all("tr")[2].all("td")] == ["256", "0.400", "0.300", "2.00", "9.0", "0.500"]


def test_picture_for_mlflow_has_a_chart_for_each_curve() -> None:
    found = ElementTree.fromstring(as_picture(VALIDATION_PASSES, Background(max_kl=10.0)))
    titles = [
        text.text or "" for text in found.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "title"
    ]
    assert titles[0] == "Reward and judge against KL" and len(titles) == len(set(titles)) > 2
    assert as_picture([], Background()) == ""


def test_training_curves_without_judge_scores() -> None:
    passes = [{name: value for name, value in row.items() if not name.startswith("judge")} for row in VALIDATION_PASSES]
    page = page_of(*forty_prompts(), training=passes)
    assert "Training curves" in page
    assert "Score of the first judge" not in page and "against KL" not in page
    assert "Score of the first judge" in page_of(*forty_prompts())


def test_region_of_over_optimization_is_marked() -> None:
    plain = page_of(*forty_prompts())
    assert "Reward and judge against KL" in plain and "over-optimized</text>" not in plain
    rows = [dict(row) for row in VALIDATION_PASSES]
    rows[2] |= {"judge_score": 0.1, "judge_gain": 0.5, "judge_fall": 0.2, "judge_fall_se": 0.05}
    page = page_of(*forty_prompts(), training=rows)
    assert ">over-optimized</text>" in page
    assert "Marked as over-optimized: KL 2.00 to 4.00." in page
    rows[2] |= {"judge_fall_se": 0.5}
    assert ">over-optimized? within noise</text>" in page_of(*forty_prompts(), training=rows)


def test_texts_of_models_and_people_are_escaped() -> None:
    c, judge = both_of([0.0], [1.0])
    hostile = "</script><script>alert('& you')</script><!-- costs --><!-- /costs -->{{ 7 * 7 }}"
    object.__setattr__(c.policy.completions[0], "response", hostile)
    object.__setattr__(c.policy.completions[0], "prompt", Prompt(prompt=hostile, id="1"))
    rival = Rival(
        method="dpo", outcome=Outcome(method="dpo", decision="promote", win_rate=0.5, kl=1.0), numbers={"length_dpo": 1.0},
        sft=[], responses=[hostile], measurements={}, facts={"reason": hostile},
    )  # fmt: skip
    numbers = numbers_of(c, judge)
    background = Background(
        policy={"kept_reason": hostile}, settings=json.dumps({"key": hostile}), rival=rival,
        inputs={hostile: Manifest(kind="judge", files={}, code_revision=hostile)}, costs=[StageCost(stage=hostile, seconds=1.0)],
    )  # fmt: skip
    verdict = Decision(decision="reject", reason=hostile)
    page = as_html(c, [judge], numbers, verdict, VALIDATION_PASSES, seed=0, background=background)
    root = parse(page)
    check_structure(root)
    assert len(root.all("script")) == 1
    assert page.count("<!-- costs -->") == 1
    # Prompt, response, that of the other policy, both verdicts, the reason of the export, settings, input and revision, stage.
    assert root.text.count(hostile) == 10


@pytest.mark.parametrize("size", [1, 2])
def test_page_of_few_prompts(size: int) -> None:
    root = parse(page_of(*both_of([0.0] * size, [1.0] * size), training=[]))
    check_structure(root)
    assert "no verdict" in root.text
    assert not re.search(r"\b(nan|inf|None)\b", root.text)


def test_page_of_a_judge_without_scores_has_no_plot_of_them() -> None:
    c, _ = forty_prompts()
    page = page_of(c, pairwise_of([1.0, 0.0, 0.5, NAN] + [1.0] * 36), training=[])
    assert not parse(page).all("svg", role="img")  # and all responses have the same length
    text = text_of(page)
    assert "Scores per response" not in text
    assert "PPO preferred (1) or not (-1)" in text
    assert "Promoted. win rate 0.962" in text
    assert text.count("+1.00") >= 5
    assert "Where judges disagree" not in text
    assert "Cohen's kappa" not in text


def test_page_of_a_judge_that_could_not_be_asked() -> None:
    c, _ = forty_prompts()
    page = page_of(c, pairwise_of([NAN] * 40, error="the server <is> down"), training=[])
    assert "<is>" not in page
    text = text_of(page)
    assert "Rejected: no verdict: the judge gpt cannot tell, because the server <is> down." in text
    assert "cannot tell: the server <is> down" in text
    assert "win rate (judge)" not in text
    assert "No verdict" in text


COUNTS = {
    "requests": 1234.0, "cached": 80.0, "refused": 2.0, "unreadable": 0.0, "rejected": 3.0,
    "input_tokens": 1e6, "output_tokens": 2500.0, "cost": 1.5,
}  # fmt: skip


def test_page_shows_all_judges() -> None:
    c, first = forty_prompts()
    second = pairwise_of([0.0] * 39 + [NAN], consistent=[True] * 30 + [False] * 10, name="gpt", counts=COUNTS)
    third = judged_of([0.0] * 40, [1.0] * 40, name="other", agreement=CHANCE)
    page = page_of(c, first, second, third)
    text = text_of(page)
    assert "linear linear 81.1% [75.0%, 86.0%] on 200 held-out human pairs 55.0%" in text
    assert (
        "gpt endpoint 81.1% [75.0%, 86.0%] on 200 held-out human pairs 55.0% 76.9% 0.000 [0.000, 0.000]" in text
    )  # 30 of 39
    assert "1,234 requests, 80 from the cache, 1,002,500 tokens, cost 1.50; 2 refused, 3 rejected" in text
    reason = "its agreement with people, 52.0% [45.0%, 59.0%] on 200 held-out human pairs, is not above chance"
    assert f"other linear 52.0% [45.0%, 59.0%] on 200 held-out human pairs 55.0% cannot tell: {reason}" in text
    numbers = numbers_of(c, first, second, third)
    assert f"linear and gpt {numbers['kappa/linear/gpt']:.2f}." in text
    assert "kappa/linear/other" not in numbers and "kappa/gpt/other" not in numbers
    assert "Where judges disagree" in text
    assert "linear: PPO gpt: SFT other: PPO" in text
    (section,) = [one for one in parse(page).all("section") if one.attributes.get("aria-labelledby") == "samples"]
    disagree = [card for card in section.all("article") if card.attributes["data-disagree"] == "1"]
    assert disagree and not [
        card for card in disagree if "linear: SFT" in card.text
    ]  # a judge that cannot tell does not count
    assert "win rate (gpt) 0.000 [0.000, 0.000]" in text
    assert "win rate (other)" not in text


def test_what_judges_say_is_escaped() -> None:
    c, first = forty_prompts()
    c = replace(c, sft=replace(c.sft, completions=[replace(x, response="<b>it</b>") for x in c.sft.completions]))
    second = pairwise_of([NAN] * 40, error="<script>alert(1)</script>")
    other = pairwise_of([0.0] * 40, name="other")
    page = page_of(c, first, second, other)
    assert "Where judges disagree" in page
    assert "<script>alert" not in page and "<b>it" not in page
    assert "cannot tell: &lt;script&gt;" in page


def test_page_tells_settings_digests_and_costs() -> None:
    c, judge = forty_prompts()
    numbers = numbers_of(c, judge)
    manifest = Manifest(
        kind="sft_model", files={}, config_digest="c" * 64, code_revision="0123abc", measurements={"seconds": 61.0}
    )
    background = Background(
        inputs={"sft_model": manifest}, settings='{"seed":3}', costs=stage_costs({"sft_model": manifest}, {"seconds": 9.0}, "ppo")
    )  # fmt: skip
    page = as_html(c, [judge], numbers, decide(numbers, judge, GateConfig()), [], seed=0, background=background)
    text = text_of(page)
    assert f"sft model {manifest.digest} {'c' * 64} 0123abc" in text
    assert '{ "seed": 3 }' in text
    assert "sft 1:01 evaluation 0:09 all 1:10" in text
    assert not [fold for fold in parse(page).all("details") if "open" in fold.attributes]


def test_rows_of_judges() -> None:
    c, first = forty_prompts()
    second = pairwise_of([1.0] * 40, name="gpt", agreement=None)
    rows = judge_rows(numbers_of(c, first, second), [first, second])
    assert rows[1] == {
        "name": "gpt",
        "kind": "endpoint",
        "agreement": "not measured",
        "longer": "",
        "consistency": "100.0%",
        "cost": "",
        "win_rate": "cannot tell: it answered none of the held-out human pairs",
    }
    assert [rows[0][key] for key in ("name", "kind", "longer", "consistency")] == ["linear", "linear", "55.0%", ""]
    free = judge_rows({}, [pairwise_of([1.0], counts=COUNTS | {"cost": 0.0, "refused": 0.0, "rejected": 0.0})])
    assert free[0]["cost"] == "1,234 requests, 80 from the cache, 1,002,500 tokens"


# The tables.


def test_comparison_rows() -> None:
    c, judge = both_of([0.0, 1.0], [1.0, 1.0], kl=[2.0, 4.0], exact_kl=[1.0, 2.0])
    rows = comparison_rows(numbers_of(c, judge))
    by_name = {row["name"]: (row["sft"], row["policy"]) for row in rows}
    assert by_name["win rate (judge), [95% interval]"] == ("", "0.750 [0.500, 1.000]")
    assert by_name["win rate at equal length and ending (2 responses)"] == ("", "0.750 [0.500, 1.000]")
    assert by_name["win rate, both cut to equal length"] == ("", "0.750 [0.500, 1.000]")
    assert by_name["win rate, length-controlled"] == ("", "0.749 [0.500, 0.997]")  # the weak penalty
    assert by_name["judge score"] == ("0.500", "1.000")
    assert by_name["KL to SFT (nats per response)"] == ("0", "3.000 [2.000, 4.000]")
    assert by_name["KL to SFT, exact per token"] == ("0", "1.500 [1.000, 2.000]")
    assert by_name["length (tokens)"] == ("3.0", "3.0")
    assert by_name["EOS rate"] == ("100.0%", "100.0%")
    assert by_name["judge agreement with people (held-out pairs)"] == ("", "0.811 [0.750, 0.860]")
    assert by_name["reward model accuracy (held-out human pairs)"] == ("", "72.2%")
    assert len(by_name) == len(rows) == 13


def test_comparison_rows_of_other_judges() -> None:
    c, judge = both_of([0.0] * 4, [1.0] * 4)
    judges = [judge, pairwise_of([1.0, 0.0, 1.0, 1.0]), judged_of([0.0] * 4, [1.0] * 4, name="c", agreement=CHANCE)]
    by_name = {row["name"]: row["policy"] for row in comparison_rows(numbers_of(c, *judges))}
    assert by_name["win rate (gpt)"].startswith("0.750 [")
    assert by_name["gpt agreement with people"] == "0.811 [0.750, 0.860]"
    assert by_name["c agreement with people"] == "0.520 [0.450, 0.590]"
    assert "win rate (c)" not in by_name


def test_comparison_rows_leave_out_what_was_not_measured() -> None:
    assert comparison_rows({"confidence": 0.9}) == []
    kl = {"confidence": 0.9, "kl": 3.0, "kl_low": 2.0, "kl_high": 4.0}
    assert comparison_rows(kl) == [
        {"name": "KL to SFT (nats per response)", "sft": "0", "policy": "3.000 [2.000, 4.000]"}
    ]
    without_interval = {"confidence": 0.9, "judge_accuracy": 0.75}  # as earlier versions wrote it
    assert [row["policy"] for row in comparison_rows(without_interval)] == ["0.750"]
    c = comparison_of([0.0] * 4, [1.0] * 4)
    cannot_tell = pairwise_of([NAN] * 4, agreement=None, error="it is down")
    names = [row["name"] for row in comparison_rows(numbers_of(c, cannot_tell))]
    assert names == [
        "reward model score",
        "KL to SFT (nats per response)",
        "KL to SFT, exact per token",
        "length (tokens)",
        "EOS rate",
        "distinct-2 at equal length",
        "reward model accuracy (held-out human pairs)",
    ]


def table_cells(lines: list[str]) -> list[list[str]]:
    """The cells of the lines of Markdown tables."""
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("|")]


def test_markdown_summary() -> None:
    c, judge = both_of([0.0, 1.0], [1.0, 1.0])
    other = pairwise_of([1.0, 1.0], agreement=None)
    numbers = numbers_of(c, judge, other)
    lines = as_markdown(numbers, [judge, other], Decision(decision="promote", reason="it is better")).splitlines()
    assert lines[0] == "# Promote"
    assert lines[2] == "it is better."
    assert "| judge score | 0.500 | 1.000 |" in lines
    agreement = "81.1% [75.0%, 86.0%] on 200 held-out human pairs"
    assert f"| linear | {agreement} | 0.750 [0.500, 1.000] |" in lines
    assert "| gpt | not measured | cannot tell: it answered none of the held-out human pairs |" in lines
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(comparison_rows(numbers)) + 2 + 2


def test_error_of_a_judge_does_not_break_the_markdown_table() -> None:
    c, judge = both_of([0.0, 1.0], [1.0, 1.0])
    other = pairwise_of([NAN, NAN], error="its function raised ValueError: a | b")
    text = as_markdown(numbers_of(c, judge, other), [judge, other], Decision(decision="promote", reason="it is better"))
    assert {len(cells) for cells in table_cells(text.splitlines())} == {3}


def test_markdown_has_passes_samples_and_costs_that_no_text_breaks() -> None:
    c, judge = both_of([0.0, 1.0], [1.0, -1.0])
    object.__setattr__(c.policy.completions[0], "response", "```\n<script>|``````")
    numbers = numbers_of(c, judge)
    background = Background(costs=[StageCost(stage="sft", seconds=61.0)])
    listing = list_cards(c, [judge], seed=0)
    text = as_markdown(numbers, [judge], decide(numbers, judge, GateConfig()), VALIDATION_PASSES, background, listing)
    assert "| 8 | 512 | 0.800 | 0.300 | 4.00 | 9.0 | 0.500 |" in text
    assert "| sft | 1:01 |" in text
    block = text[text.index("```````text\n") : text.index("\n```````\n")]
    assert block == "```````text\nprompt: prompt 0\n\nfine-tuned (SFT): sft response 0\n\nPPO: ```\n<script>|``````"
    assert "Prompt 1, gain 1.00:" in text and "Prompt 2, gain \u22122.00:" in text
