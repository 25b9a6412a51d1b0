"""Headless Chromium for tests of pages, with axe-core, which finds violations of the accessibility guidelines (WCAG 2)."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SIZES = {"phone": (360, 780), "desktop": (1280, 900)}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A browser; without Chromium the test is skipped."""
    pytest.importorskip("playwright")
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield chromium
        chromium.close()


@contextlib.contextmanager
def opened(chromium: Any, page: Path, *, size: str = "desktop", scheme: str = "light", **options: Any) -> Iterator[Any]:
    """A page at a width and in a color scheme. Requests other than that of the page itself fail the test."""
    width, height = SIZES[size]
    context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
    tab = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page.as_uri())
    yield tab
    assert requests == [page.as_uri()] and errors == []
    context.close()


def violations(tab: Any) -> list[str]:
    """What axe-core finds wrong with the page, with the first elements."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(tab).response
    assert len(found["passes"]) > 20  # it did look
    return [f"{rule['id']}: {[node['html'][:200] for node in rule['nodes'][:3]]}" for rule in found["violations"]]
