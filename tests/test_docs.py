"""The documents name things that exist: files, settings, metrics, make targets."""

import re
import subprocess
from pathlib import Path

import pytest

from components.ppo.curves import PANELS
from components.rlhf.config.params import Params
from pipelines.reference import TARGET, as_markdown, leaves

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not {".venv", ".pytest_cache", "runs", "node_modules"} & set(path.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "SECURITY.md"])
def test_every_promise_names_tests_that_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    promises = re.search(r"## What we promise\n(.*?)(\n## |\Z)", text, re.DOTALL)
    assert promises
    rows = [row for row in promises[1].splitlines() if row.startswith("| ") and "kept by" not in row]
    assert len(rows) > 8
    for row in rows:
        keepers = re.findall(r"`(tests/[^`]+)`", row.rpartition(" | ")[2])
        assert keepers or "](SECURITY.md)" in row, row
        for path, _, name in (keeper.partition("::") for keeper in keepers):
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"def {name or 'test_'}", source), f"{path}::{name}"


def test_readme_tree_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## What is inside") : text.index("Where to start reading")]
    folders = []
    for indent, name in re.findall(r"^    ( *)([a-z_]+)/", tree, flags=re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name]
        assert (ROOT / Path(*folders)).is_dir(), "/".join(folders)
    stages = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert stages == {name for name in stages if f"      {name}/" in tree}


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert named <= targets


def test_every_setting_is_documented() -> None:
    """Each parameter has a sentence of its own, and the reference of all of them is fresh."""
    assert [name for name, _, sentence in leaves(Params, "") if not sentence] == []
    assert TARGET.read_text(encoding="utf-8") == as_markdown(), "run make compile"


def test_every_plotted_metric_is_explained() -> None:
    page = (ROOT / "components" / "ppo" / "README.md").read_text(encoding="utf-8")
    assert [name for name, _ in PANELS if f"`{name}`" not in page] == []


def test_stages_have_a_page() -> None:
    assert [
        p.parent.name for p in (ROOT / "components").glob("*/component.py") if not (p.parent / "README.md").is_file()
    ] == []


def test_make_help_names_every_verb() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in ("setup", "run", "test", "test-all", "lint", "compile", "bench"):
        assert f"make {verb} " in text


def test_every_test_that_keeps_a_promise_exists() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    promises = page[page.index("## What we promise") : page.index("**Secrets**")]
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)`", row)
        assert named and all((ROOT / name).is_file() for name in named), row
