"""The pages of the stages in headless Chromium: accessible on a phone and a desktop, light and dark, without a network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.dpo import report as dpo_report
from components.ppo import curves
from components.prepare_data.report import as_html, shown_examples
from components.rlhf.config.dpo import DpoConfig
from components.rlhf.config.prepare_data import DataConfig
from tests.dpo.test_report import history as dpo_history
from tests.ppo.test_curves import OUTCOME, PPO
from tests.ppo.test_curves import history as ppo_history
from tests.prepare_data.test_leaks import prepare_rows
from tests.prepare_data.test_preview import TOKENIZER, rows
from tests.support.browser import browser, opened, violations

pytestmark = pytest.mark.browser


def data_page(folder: Path) -> str:
    prepared = prepare_rows(folder, rows(60))
    data = DataConfig.model_validate({"preferences": {"path": "x"}, "prompts": {"path": "x"}})
    return as_html(prepared, data, shown_examples(prepared, data, TOKENIZER, seed=0))


PAGES: dict[str, Callable[[Path], str]] = {
    "data": data_page,
    "ppo": lambda _: curves.as_html(ppo_history(40, evals=True), PPO, OUTCOME),
    "dpo": lambda _: dpo_report.as_html(dpo_history(40), {}, DpoConfig()),
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_violation_of_accessibility(chromium: Any, tmp_path: Path, name: str) -> None:
    page = tmp_path / f"{name}.html"
    page.write_text(PAGES[name](tmp_path), encoding="utf-8")
    for size, scheme in (("phone", "dark"), ("desktop", "light")):
        with opened(chromium, page, size=size, scheme=scheme) as tab:
            for fold in tab.locator("details").all():
                fold.evaluate("fold => { fold.open = true }")
            assert violations(tab) == [], (size, scheme)
            assert tab.evaluate("document.documentElement.scrollWidth") <= tab.viewport_size["width"]
