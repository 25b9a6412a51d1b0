"""The documents refer to things that exist: files, headings, tests, parameters, metrics, make targets."""

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
    if not {".venv", ".cache", ".pytest_cache", "runs", "node_modules"} & set(path.relative_to(ROOT).parts)
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_headings_exist(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link) if link else page
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, (
            f"{link}#{anchor}"
        )


def test_readme_has_at_most_1300_words() -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(text.split()) <= 1300


@pytest.mark.parametrize(
    "page",
    ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "docs/guarantees.md", "docs/results.md",
     "benchmarks/LOG.md", "components/README.md", "manifests/README.md"],
)  # fmt: skip
def test_commands_are_in_fenced_blocks(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {4}.*", text, flags=re.MULTILINE) == []


def test_every_guarantee_names_tests_that_exist() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8").partition("## Not guaranteed")[0]
    rows = [row for row in text.splitlines() if row.startswith("| ") and not row.startswith("| guarantee |")]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`(tests/[^`]+)`", row.rpartition(" | ")[2])
        assert named, row
        for path, _, name in (test.partition("::") for test in named):
            source = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"def {name}\(" if name else "def test_", source), f"{path}::{name}"


def test_readme_tree_matches_the_folders() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("## Repository") : text.index("## Where to read on")]
    folders: list[str] = []
    for indent, name in re.findall(r"^( *)([a-z_]+)/", tree, flags=re.MULTILINE):
        folders = [*folders[: len(indent) // 2], name]
        assert (ROOT / Path(*folders)).is_dir(), "/".join(folders)
    stages = {path.parent.name for path in (ROOT / "components").glob("*/component.py")}
    assert stages == {name for name in stages if f"\n  {name}/" in tree}


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    scripts = "".join(re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL))
    named = {*re.findall(r"`make ([a-z-]+)", text), *re.findall(r"^make ([a-z-]+)", scripts, flags=re.MULTILINE)}
    assert {"setup", "run", "images", "study"} <= named <= targets


def test_every_parameter_is_documented() -> None:
    """Each parameter has a description, and the committed reference is up to date."""
    assert [name for name, _, description in leaves(Params, "") if not description] == []
    assert TARGET.read_text(encoding="utf-8") == as_markdown(), "run make compile"


def test_every_plotted_metric_is_documented() -> None:
    page = (ROOT / "components" / "ppo" / "README.md").read_text(encoding="utf-8")
    assert [name for name, _ in PANELS if f"`{name}`" not in page] == []


def test_every_stage_has_a_readme() -> None:
    assert [
        p.parent.name for p in (ROOT / "components").glob("*/component.py") if not (p.parent / "README.md").is_file()
    ] == []


def test_make_help_lists_every_target() -> None:
    text = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("setup", "run", "test", "test-all", "lint", "compile", "bench"):
        assert f"make {target} " in text
