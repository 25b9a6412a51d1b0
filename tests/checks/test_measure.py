"""Both models on texts and prompts: against slow versions, and what happens when nothing can be measured."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.checks import prompts
from components.checks.__main__ import main
from components.rlhf.artifacts.check_rows import CheckRow, read_rows
from components.rlhf.artifacts.directory import open_artifact
from components.rlhf.artifacts.manifest import write_manifest
from components.rlhf.data.datasets import save_dataset
from components.rlhf.data.records import Conversation, Demonstration, Message, Prompt, Turn
from components.rlhf.rewards import posting
from tests.support.judge_server import Reply
from tests.support.reward_server import RewardServer, chat
from tests.support.tiny_model import make_tiny_model

TEXTS = [("It was", " good"), ("This", " a good film"), ("We", " so")]
PROMPTS = ["Tell me", "How do I", "A film that nobody has", "Why"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    paths = {name: folder / name for name in ("sft_model", "policy", "demonstrations", "prompts")}
    tokenizer = dict(tokenizer_digest="a" * 64, chat_template_digest="b" * 64)
    for seed, (name, kind) in enumerate((("sft_model", "sft_model"), ("policy", "policy_model"))):
        make_tiny_model(paths[name], seed=seed)
        write_manifest(paths[name], kind=kind, **tokenizer)
    heldout = [Demonstration(turns=(Turn(context=prompt, answer=answer),)) for prompt, answer in TEXTS]
    data: dict[str, dict[str, Any]] = {
        "demonstrations": {"train": [], "heldout": heldout},
        "prompts": {"heldout": [Prompt(prompt="It is", id="0")]},
    }
    for name, splits in data.items():
        paths[name].mkdir()
        save_dataset(paths[name], splits, max_tokens=64, counts={})
        write_manifest(paths[name], kind=name, **tokenizer)
    return paths


def run(inputs: dict[str, Path], folder: Path, *checks: dict[str, Any], **changes: Any) -> list[CheckRow]:
    """The rows that the stage writes."""
    settings = {
        "model": {"precision": "fp32"}, "checks": checks, "sampling": {"max_new_tokens": 5}, "num_bootstrap": 50, "seed": 0,
    } | changes  # fmt: skip
    paths = inputs | {name: folder / name for name in ("checks", "metrics", "summary")}
    arguments = [word for name, path in paths.items() for word in (f"--{name.replace('_', '-')}", str(path))]
    storage = json.dumps({"answers_uri": str(folder / "answers")})
    options = ["--settings", json.dumps(settings), "--tracking", '{"enabled": false}', "--storage", storage]
    result = CliRunner().invoke(main, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return read_rows(folder / "checks")


@torch.no_grad()
def slow_nats(model: Path) -> list[float]:
    """-log p(answer | prompt), with the token that ends it, one text at a time."""
    tokenizer, lm = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    )
    found = []
    for prompt, answer in TEXTS:
        before, after = tokenizer(prompt)["input_ids"], [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        logprobs = lm(torch.tensor([before + after])).logits[0].log_softmax(-1)
        found.append(-sum(float(logprobs[len(before) + i - 1, token]) for i, token in enumerate(after)))
    return found


def test_perplexity_is_nats_per_token_of_the_answers(inputs: dict[str, Path], tmp_path: Path) -> None:
    (row,) = run(inputs, tmp_path, {"kind": "perplexity", "max_increase": 100.0})
    tokens = sum(len(answer) + 1 for _, answer in TEXTS)  # bytes, and the end
    sft, policy = (sum(slow_nats(inputs[name])) / tokens for name in ("sft_model", "policy"))
    assert (row.sft, row.policy) == (pytest.approx(sft, rel=1e-5), pytest.approx(policy, rel=1e-5))
    assert row.value == pytest.approx(policy - sft, rel=1e-4) and row.low <= row.value <= row.high
    assert row.passed and row.num == len(TEXTS)
    assert open_artifact(tmp_path / "checks", "checks").parents.keys() == {
        "sft_model",
        "policy_model",
        "demonstrations",
        "prompts",
    }
    assert json.loads((tmp_path / "metrics").read_text())["perplexity/max_increase"] == row.value


def test_same_model_has_no_difference(inputs: dict[str, Path], tmp_path: Path) -> None:
    same = tmp_path / "policy"
    make_tiny_model(same, seed=0)
    write_manifest(same, kind="policy_model", tokenizer_digest="a" * 64, chat_template_digest="b" * 64)
    checks = [
        {"kind": "perplexity", "max_increase": 0.0},
        {"kind": "prompts", "prompts": PROMPTS, "pattern": "[a-m]", "max_increase": 0.4, "max_decrease": 0.4, "sampling": "evaluation"},
    ]  # fmt: skip
    rows = run(inputs | {"policy": same}, tmp_path, *checks)
    assert [row.passed for row in rows] == [True] * 3 and {row.value for row in rows} == {0.0}


def test_hits_are_responses_with_the_pattern(inputs: dict[str, Path], tmp_path: Path) -> None:
    """Greedy responses: those of transformers' generate."""
    expected, responses = {}, {}
    for name in ("sft_model", "policy"):
        tokenizer, lm = AutoTokenizer.from_pretrained(inputs[name]), AutoModelForCausalLM.from_pretrained(inputs[name])
        texts = []
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            made = lm.generate(ids, do_sample=False, max_new_tokens=5)[0, ids.shape[1] :]
            texts.append(tokenizer.decode(made, skip_special_tokens=True))
        responses[name] = texts
    letter = next(c for c in responses["policy"][0] if c.isascii() and c.isprintable() and c not in r"\[]^-")
    for name, texts in responses.items():
        expected[name] = np.mean([letter in text for text in texts])
    rows = run(inputs, tmp_path, {"kind": "prompts", "name": "letters", "prompts": PROMPTS, "pattern": f"[{letter}]", "min_rate": 0.01,
                                  "max_increase": 1.0})  # fmt: skip
    assert [(row.sft, row.policy) for row in rows] == [(expected["sft_model"], expected["policy"])] * 2
    assert rows[0].value == expected["policy"] > 0 and rows[1].value == expected["policy"] - expected["sft_model"]
    lines = [json.loads(line) for line in (tmp_path / "checks" / "letters.jsonl").read_text().splitlines()]
    assert [line["policy"]["response"] for line in lines] == responses["policy"]
    assert [line["prompt"] for line in lines] == PROMPTS


def graded(*grades: str) -> Any:
    """Answers in the order of the prompts: first those of the SFT model, then those of the policy."""

    def answer(body: dict[str, Any]) -> Any:
        question = body["messages"][1]["content"]
        text = question.partition("[Prompt]\n")[2].partition("\n\n[Response]")[0]
        return chat(grades[PROMPTS.index(text)])

    return answer


def test_grades_from_the_threshold_on_are_hits(inputs: dict[str, Path], tmp_path: Path) -> None:
    with RewardServer(graded("[[7]]", "[[6.9]]", "[[10]]", "0")) as server:
        endpoint = {"url": server.url.removesuffix("/get_reward"), "model": "m", "rubric": "10: kind."}
        check = {"kind": "prompts", "prompts": PROMPTS, "endpoint": endpoint, "threshold": 7, "max_decrease": 0.5}
        (row,) = run(inputs, tmp_path, check)
    assert (row.sft, row.policy, row.passed) == (0.5, 0.5, True)
    assert server.requests[0]["messages"][0]["content"] == "10: kind."


@pytest.mark.parametrize(("bound", "policy"), [({"max_rate": 0.96}, 0.75), ({"min_rate": 0.05}, 0.5)])
def test_response_without_a_grade_counts_against_the_policy(
    inputs: dict[str, Path], tmp_path: Path, bound: dict[str, float], policy: float
) -> None:
    with RewardServer(graded("[[7]]", "I would rather not say", "[[10]]", "0")) as server:
        endpoint = {"url": server.url.removesuffix("/get_reward"), "model": "m", "rubric": "10: kind."}
        (row,) = run(inputs, tmp_path, {"kind": "prompts", "prompts": PROMPTS, "endpoint": endpoint, **bound})
    assert row.policy == policy and row.passed


def test_check_that_cannot_be_measured_has_not_passed_and_the_others_go_on(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posting, "SECONDS", 0.01)
    with RewardServer(lambda body: Reply(status=401, body=b"{}")) as server:
        endpoint = {"url": server.url.removesuffix("/get_reward"), "model": "m", "rubric": "x", "max_retries": 0}
        broken = {"kind": "prompts", "prompts": PROMPTS, "endpoint": endpoint, "min_rate": 0.1, "max_increase": 0.4}
        rows = run(inputs, tmp_path, broken, {"kind": "perplexity", "max_increase": 100.0})
    assert [(row.check, row.bound, row.passed) for row in rows] == [
        ("prompts", "min_rate", False), ("prompts", "max_increase", False), ("perplexity", "max_increase", True)
    ]  # fmt: skip
    assert rows[0].problem and "gives no verdict" in rows[0].sentence()
    assert "not measured" in (tmp_path / "summary").read_text()


def test_prompts_are_rendered_as_the_run_renders_its_prompts(inputs: dict[str, Path], tmp_path: Path) -> None:
    chat_prompts = tmp_path / "prompts"
    chat_prompts.mkdir()
    conversation = Conversation(messages=(Message(role="user", content="Hi"),))
    record = Prompt(prompt="<user>Hi\n<assistant>", id="0", conversation=conversation)
    save_dataset(chat_prompts, {"heldout": [record]}, max_tokens=64, counts={})
    write_manifest(chat_prompts, kind="prompts", tokenizer_digest="a" * 64, chat_template_digest="b" * 64)
    check = {"kind": "prompts", "name": "chat", "prompts": ["Hello"], "pattern": "x", "max_increase": 1.0}
    run(inputs | {"prompts": chat_prompts}, tmp_path, check)
    (line,) = (tmp_path / "checks" / "chat.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "<user>Hello\n<assistant>"


def test_response_that_cannot_be_searched_in_time_is_no_miss(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = SimpleNamespace(score=lambda completions: torch.zeros(len(completions)), counts={"failed": 1})
    monkeypatch.setattr(prompts, "open_scorer", lambda *_: scorer)
    (row,) = run(inputs, tmp_path, {"kind": "prompts", "prompts": PROMPTS, "pattern": "(a+)+$", "max_rate": 0.9})
    assert not row.passed and "1 responses could not be searched in time; simplify" in row.problem
