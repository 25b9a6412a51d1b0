"""`kfp-rlhf data`, and what the report shows of a record."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.prepare_data.examples import Segment, ShownExample, show
from components.prepare_data.report import as_html, as_markdown, shown_examples
from components.rlhf.config.prepare_data import DataConfig
from components.rlhf.data.records import Conversation, Demonstration, Message, PreferencePair, Prompt, Turn
from tests.prepare_data.test_leaks import assistant, prepare_rows, question, user
from tests.support.chat_tokenizers import make_tokenizer
from tests.support.html_page import check_structure, parse

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = make_tokenizer("qwen")
CHAT = Conversation(messages=(Message(role="user", content="Hi"),))


def kinds(example: ShownExample) -> list[tuple[str, str]]:
    return [(segment.kind, segment.text) for segment in example.segments]


def test_segments_are_the_tokens_with_and_without_loss() -> None:
    turns = (Turn(context="<|im_start|>q", answer="a"), Turn(context="<|im_start|>r", answer="bé"))
    example = show("x", Demonstration(turns=turns, conversation=CHAT), TOKENIZER, max_tokens=100)
    assert kinds(example) == [
        ("context", "<|im_start|>q"),
        ("learned", "a<|im_end|>"),
        ("context", "<|im_start|>r"),
        ("learned", "bé<|im_end|>"),
    ]
    assert [segment.num_tokens for segment in example.segments] == [2, 2, 2, 4]  # é has two bytes
    cut = show("x", Demonstration(turns=turns, conversation=CHAT), TOKENIZER, max_tokens=3)
    assert kinds(cut) == [("context", "<|im_start|>q"), ("learned", "a")] and cut.is_truncated


def test_segments_of_pairs_and_prompts() -> None:
    pair = show("x", PreferencePair(prompt="p", chosen="c", rejected="r", conversation=CHAT), TOKENIZER, max_tokens=100)
    assert kinds(pair) == [("context", "p"), ("chosen", "c<|im_end|>"), ("rejected", "r<|im_end|>")]
    assert kinds(show("x", Prompt(prompt="p"), TOKENIZER, max_tokens=100)) == [("context", "p")]


def rows(num: int) -> dict[str, list[dict[str, Any]]]:
    return {
        "demonstrations": [
            {"messages": [user(question(n)), assistant("```\n<b>Yes</b> | no\n```")]} for n in range(num)
        ],
        "preferences": [
            {"prompt": question(n), "chosen": "Yes.", "rejected": "No.", "source": "x"} for n in range(num)
        ],
        "prompts": [{"prompt": question(n)} for n in range(num)],
    }


def test_report_has_ten_examples_and_escapes_their_text(tmp_path: Path) -> None:
    out = prepare_rows(tmp_path, rows(60))
    data = DataConfig.model_validate({"preferences": {"path": "x"}, "prompts": {"path": "x"}})
    examples = shown_examples(out, data, TOKENIZER, seed=0)
    assert len(examples) == 10
    html, markdown = as_html(out, data, examples), as_markdown(out, data, examples)
    assert "&lt;b&gt;Yes&lt;/b&gt;" in html and "<b>" not in html
    assert html.count("<pre>") == 10 and "<svg" in html and '<span class="learned">' in html
    root = parse(html)
    check_structure(root)
    assert not re.search(r"<script|(?:src|href)\s*=\s*[\"'](?!#)|https?:|@import", html)
    assert [figure.all("figcaption")[0].text for figure in root.all("figure")] == [
        f"{name} (number of records)" for name in ("Demonstrations", "Preferences", "Prompts")
    ]
    assert "````text\n" in markdown and "\u27e6Yes.<|im_end|>\u27e7" in markdown
    assert f"| data.preferences ({tmp_path / 'preferences.jsonl'}) | 60 | 60 | none | none | source |" in markdown


def test_fence_is_longer_than_any_in_the_text() -> None:
    from components.prepare_data.report import _fenced

    example = ShownExample(title="x", segments=[Segment(text="a ````", kind="context", num_tokens=1)])
    assert _fenced(example).startswith("`````text\n") and _fenced(example).endswith("\n`````")


@pytest.fixture
def params(tmp_path: Path, tiny_model: Path) -> Path:
    sources = {}
    for section, content in rows(60).items():
        path = tmp_path / f"{section}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        sources[section] = {"path": str(path)}
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"model": {"source": str(tiny_model)}, "data": sources}))
    return path


def run_data(params: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipelines", "data", str(params), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_command_shows_the_data_without_a_run(params: Path, tmp_path: Path) -> None:
    result = run_data(params, "--rows", "40", "--html", str(tmp_path / "data.html"))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "The first 40 records of each source; --rows 0 reads all." in result.stdout
    assert "All sources are rendered with the model's chat template." in result.stdout
    assert "preferences.jsonl): 40 read, 40 kept\n" in result.stdout
    assert "preferences.jsonl): columns not read: source" in result.stdout
    assert "no prompt of one role occurs" in result.stdout and "\u27e6Yes.<eos>\u27e7" in result.stdout
    assert (tmp_path / "data.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_command_reports_bad_data_in_one_sentence(params: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "a"}\n' * 10)
    result = run_data(params)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: data.prompts ({tmp_path / 'prompts.jsonl'}): only 0 of 10 records are usable, at least 80% must be: 10 no field "
        f"'prompt' (for example {tmp_path / 'prompts.jsonl'}:1: no field 'prompt' (found: text); set columns: {{prompt: text}}).\n"
    )
