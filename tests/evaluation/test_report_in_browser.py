"""The report in headless Chromium: accessible, readable on a phone, without a network, and searchable."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.evaluation.better import Outcome
from components.evaluation.report import Background, as_html
from components.evaluation.rival import Rival
from components.evaluation.side_by_side import compare_policies
from components.evaluation.verdict import decide, summarize
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.data.records import ResponseTurn
from components.rlhf.page.costs import StageCost, complete
from tests.support.browser import browser, opened, violations
from tests.support.comparisons import comparison_of, judged_of, pairwise_of

pytestmark = pytest.mark.browser
NUM_ROWS = 60
LONG = "averyveryverylongwordwithoutanyspace" * 4


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every part of a report: two policies, two judges, turns, curves with a region, costs and settings."""
    scores = [0.0] * NUM_ROWS, [float((17 * i) % NUM_ROWS - 20) for i in range(NUM_ROWS)]
    comparison = comparison_of(*scores, ppo_ends=[(3 + i % 7, i % 2 == 0) for i in range(NUM_ROWS)])
    completions = comparison.policy.completions
    completions[0] = replace(completions[0], response=f"{LONG}\n" * 3)
    turns = (
        ResponseTurn(speaker="model", start=0, stop=1, text="1 + 1"),
        ResponseTurn(speaker="environment", start=1, stop=2, text="2"),
    )
    completions[1] = replace(completions[1], turns=turns)
    comparison = replace(comparison, method="dpo")
    judges = [judged_of(*scores), pairwise_of([0.0] * NUM_ROWS)]
    numbers = summarize(comparison, judges, EvaluationConfig(num_bootstrap=100), reward_accuracy=0.7, seed=0)
    verdict = decide(numbers, judges[0], GateConfig())
    rows = [
        {
            "iteration": 4.0 * i, "num_rollouts": 64.0 * i, "reward": float(i), "judge_score": score, "kl": float(i), "length": 9.0,
            "eos_rate": 0.5, "reward_gain": float(i), "judge_gain": score, "judge_fall": 0.5, "judge_fall_se": 0.1,
        }
        for i, score in enumerate((0.0, 1.0, 0.5))
    ]  # fmt: skip
    others = {name.replace("_dpo", "_ppo"): value for name, value in numbers.items()}
    rival = Rival(
        method="ppo", outcome=Outcome(method="ppo", decision="reject", win_rate=0.5, kl=2.0), numbers=others,
        sft=comparison.sft.completions, responses=["another"] * NUM_ROWS, measurements={}, training=rows,
        facts={"kept_iteration": 4.0, "reason": "KL 2.00 nats per response is above 1"},
    )  # fmt: skip
    manifest = Manifest(kind="judge", files={}, code_revision="0" * 40, created_at="2026-01-01T00:00:00+00:00")
    background = Background(
        both=compare_policies(comparison, numbers, verdict, {}, rival), rival=rival, inputs={"judge": manifest},
        settings=json.dumps({"seed": 0}), costs=[StageCost(stage="sft", seconds=1.0)], max_kl=10.0,
    )  # fmt: skip
    page = as_html(comparison, judges, numbers, verdict, [], seed=0, background=background)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(complete(page, [StageCost(stage="ppo", seconds=9.0, price=2.0)], "seed: 0\n"), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "desktop"])
def test_report_has_no_violation_of_accessibility(chromium: Any, report: Path, size: str, scheme: str) -> None:
    with opened(chromium, report, size=size, scheme=scheme) as tab:
        for fold in tab.locator("details").all():
            fold.evaluate("fold => { fold.open = true }")
        assert violations(tab) == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]


def test_colors_follow_the_scheme(chromium: Any, report: Path) -> None:
    for scheme, is_dark in (("light", False), ("dark", True)):
        with opened(chromium, report, scheme=scheme) as tab:
            color = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(int(c) for c in color[4:-1].split(",")) < 100) == is_dark


def test_report_is_readable_without_scripts(chromium: Any, report: Path) -> None:
    with opened(chromium, report, size="phone", java_script_enabled=False) as tab:
        assert not tab.locator("#tools").is_visible()
        assert tab.locator("article:visible").count() >= 20
        assert tab.locator("article").count() >= NUM_ROWS
        chart = tab.locator("svg.chart").first
        band = chart.locator(".hit").nth(1)
        tip = band.locator(".tip")
        assert not tip.is_visible()
        band.locator(".band").hover()
        assert tip.is_visible() and "reward 1.00" in tip.text_content()


def test_samples_are_searched_sorted_and_filtered(chromium: Any, report: Path) -> None:
    with opened(chromium, report) as tab:
        shown = tab.locator("#flat article")
        tab.fill("#search", "PROMPT response 17")  # words in any order and case, of the prompt and the responses
        assert 1 <= shown.count() < 20
        assert all("17" in text.lower() for text in shown.all_text_contents())
        assert not tab.locator("#groups").is_visible()
        tab.fill("#search", "no such text")
        assert tab.locator("#found").text_content() == "0 samples"
        tab.fill("#search", "")
        assert tab.locator("#groups").is_visible() and shown.count() == 0

        tab.select_option("#order", "gain:1")
        gains = [float(card.get_attribute("data-gain")) for card in shown.all()]
        assert gains == [float(i) for i in range(-20, 0)]  # a page of the biggest losses
        tab.click("#more")
        assert shown.count() == 40
        tab.select_option("#outcome", "win")
        assert tab.locator("#found").text_content() == "39 samples"
        assert {card.get_attribute("data-outcome") for card in shown.all()} == {"win"}
        tab.select_option("#outcome", "disagree")
        assert tab.locator("#found").text_content() == "39 samples"  # the second judge always prefers SFT


def test_report_works_in_a_sandboxed_frame(chromium: Any, report: Path, tmp_path: Path) -> None:
    """As Kubeflow Pipelines shows it: in a frame of its own origin that may run scripts, or none."""
    text = report.read_text(encoding="utf-8").replace("&", "&amp;").replace('"', "&quot;")
    frames = "".join(f'<iframe sandbox="{may}" srcdoc="{text}" height="900"></iframe>' for may in ("allow-scripts", ""))
    page = tmp_path / "frames.html"
    page.write_text(f'<!doctype html><html lang="en"><title>frames</title>{frames}')
    width, height = 1280, 900
    context = chromium.new_context(viewport={"width": width, "height": height})
    tab = context.new_page()
    tab.goto(page.as_uri())
    scripted, plain = (tab.frame_locator("iframe").nth(number) for number in range(2))
    scripted.locator("#search").fill("prompt 5")
    assert scripted.locator("#flat article").count() >= 1
    assert plain.locator("article:visible").count() >= 20
    context.close()


def test_printed_report_shows_what_was_folded_away(chromium: Any, report: Path) -> None:
    with opened(chromium, report) as tab:
        tab.emulate_media(media="print")
        tab.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert not tab.locator("nav").is_visible() and not tab.locator("#tools").is_visible()
        assert tab.locator("details:not(#rest) > :not(summary)").first.is_visible()
        assert len(tab.pdf()) > 10_000
