"""The documentation is a website that needs no network, and what it says to type and to write can be typed and written."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from pipelines.__main__ import cli
from pipelines.settings import load_params

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), ROOT / "pipelines" / "README.md"])
MARK = r"(?:<!-- (not run: .+|run by tests/\S+) -->\n)?"
BLOCK = re.compile(rf"{MARK}^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> Iterator[tuple[Path, str, str]]:
    """Page, mark and text of every code block of a language."""
    for page in PAGES:
        for mark, indent, name, text in BLOCK.findall(page.read_text(encoding="utf-8")):
            if name == language:
                yield page, mark, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE).replace("\\\n", "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-q",
        "-f",
        str(ROOT / "mkdocs.yml"),
        "-d",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_part_of_the_website(site: Path) -> None:
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    for page in ROOT.glob("docs/*.md"):
        assert f"docs/{page.stem.replace('README', 'index')}.html" in pages
    assert {"index.html", "components/ppo/index.html", "pipelines/params/index.html"} <= pages


def test_website_loads_nothing_from_the_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=[\"']?([^\"' >]+)", text)
        loaded += re.findall(r"<link[^>]*rel=\"?(?:stylesheet|icon)\"?[^>]*href=[\"']?([^\"' >]+)", text)
        assert loaded
        assert [address for address in loaded if address.startswith(("http", "//"))] == [], page


def test_commands_of_the_pages_can_be_parsed() -> None:
    """Every kfp-rlhf command of a page exists, with these options and values."""
    parsed = 0
    for page, _, text in blocks("sh"):
        for command in re.findall(r"^(?:echo .*\| )?kfp-rlhf ([^|&#\n]+)", text, flags=re.MULTILINE):
            if "PARAMS" not in command:  # a summary of the options
                parse(shlex.split(command), f"{page.relative_to(ROOT)}: {command}")
                parsed += 1
    assert parsed > 25


def test_other_blocks_name_their_test_or_why_there_is_none() -> None:
    """make targets are checked by test_docs.py, what the commands do by tests/pipelines, and definitions show only a signature."""
    for page, mark, text in [*blocks("sh"), *blocks("python")]:
        checked = all(re.match(r"(kfp-rlhf|make|source|echo|#|$|def |class | |\))", line) for line in text.splitlines())
        assert mark or checked, f"{page.relative_to(ROOT)}:\n{text}"
        if mark.startswith("run by "):
            assert (ROOT / mark.removeprefix("run by ")).is_file()
    for _, _, text in blocks("python"):
        compile(text, "page", "exec")


def parse(arguments: list[str], where: str) -> None:
    command: click.Command = cli
    context = click.Context(command, info_name="kfp-rlhf")
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, where
        command, arguments = found, arguments[1:]
    try:
        command.make_context(command.name, list(arguments))
    except click.exceptions.Exit:  # of --help
        pass
    except click.UsageError as error:
        if "does not exist" not in error.format_message():  # files of the reader
            pytest.fail(f"{where}: {error.format_message()}")


@pytest.mark.parametrize("number", range(len(list(blocks("yaml")))))
def test_settings_of_the_pages_are_valid(number: int, tmp_path: Path) -> None:
    """Every YAML block of a page can be put into a params file, beside the files that it names."""
    base = yaml.safe_load((ROOT / "pipelines" / "params" / "llama3_8b_8gpu.yaml").read_text(encoding="utf-8"))
    base["data"]["prompts"]["keep"] = ["answer"]
    for stage in ("sft", "reward_model", "ppo", "dpo"):
        base[stage]["training"]["zero_stage"] = 2  # adapters cannot be sharded
    profiles = {profile: {"price_per_hour": 1.0} for profile in {"cpu", *base["cluster"]["stages"].values()}}
    block = yaml.safe_load(list(blocks("yaml"))[number][2])
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(merged(merged(base, {"cluster": {"profiles": profiles}}), block)))
    for name, text in {"mine.py": "def score(): ...", "rubric.txt": "Be kind.", "answer.schema.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    load_params(tmp_path / "my.yaml")


def merged(base: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in block.items():
        both[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return both
