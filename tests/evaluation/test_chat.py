"""`kfp-rlhf chat`: the program that answers, and how it is found the models of a run."""

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from components.evaluation.chat import chat, main, printable
from components.rlhf.config.chat import ChatConfig, ChatModel
from components.rlhf.config.model import SamplingConfig
from components.rlhf.data.records import Prompt
from components.rlhf.data.tokenizer import load_tokenizer
from components.rlhf.models.loading import load_causal_lm, load_stop_ids
from components.rlhf.rewards.reward_model import load_reward_scorer
from components.rlhf.rollout.hf import HfRolloutEngine
from components.rlhf.text.errors import InputError
from pipelines.local.chat import chat_with_folders, chat_with_run
from tests.support.ppo_runs import make_reward_model
from tests.support.terminal import Terminal
from tests.support.tiny_model import make_tiny_model

FP32, CPU = torch.float32, torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    make_tiny_model(folder / "policy", seed=1)
    make_reward_model(tiny_model, folder / "reward_model")
    return {"sft": tiny_model, "policy": folder / "policy", "reward_model": folder / "reward_model"}


def config_of(models: dict[str, Path], **more: object) -> ChatConfig:
    speakers = tuple(ChatModel(name=name, folder=str(models[name])) for name in ("sft", "policy"))
    sampling = SamplingConfig(max_new_tokens=12)
    settings = {
        "models": speakers,
        "sampling": sampling,
        "precision": "fp32",
        "reward_model": str(models["reward_model"]),
    }
    return ChatConfig.model_validate(settings | more)


def talk(config: ChatConfig, text: str, monkeypatch: pytest.MonkeyPatch, *, terminal: bool = False) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    out = io.StringIO()
    chat(config, Console(file=out, force_terminal=terminal, width=120))
    return out.getvalue()


def expected_answers(models: dict[str, Path], text: str) -> list[str]:
    """Lines of the same prompt sampled by the engine of PPO and scored by the reward model."""
    scorer = load_reward_scorer(models["reward_model"], dtype=FP32, device=CPU, microbatch_tokens=4096)
    lines = []
    for name in ("sft", "policy"):
        lm = load_causal_lm(models[name], num_frozen_layers=0, dtype=FP32, trainable=False)
        engine = HfRolloutEngine(lm, load_tokenizer(models[name]), stop_ids=load_stop_ids(models[name]))
        (found,) = engine.generate([Prompt(prompt=text)], SamplingConfig(max_new_tokens=12), [0], greedy=True)
        lines.append(f"{name} (reward {float(scorer.score([found])[0]):+.2f}): {printable(found.response)}")
    return lines


def test_greedy_answers_and_scores_are_those_of_the_rollout_engine(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = talk(config_of(models, greedy=True), "Once\n\nupon", monkeypatch)
    for line in [*expected_answers(models, "Once"), *expected_answers(models, "upon")]:
        assert line in shown


def test_answers_depend_on_the_seed_alone(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, other = (talk(config_of(models, seed=seed), "Once\n", monkeypatch) for seed in (3, 3, 4))
    assert first == again != other


def test_each_model_remembers_its_own_conversation(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def encode(tokenizer: object, prompt: str, *, is_chat: bool) -> list[int]:
        heard.append(prompt)
        assert is_chat
        return [5]

    monkeypatch.setattr("components.rlhf.data.tokenizer.encode_prompt", encode)
    monkeypatch.setattr("components.rlhf.data.tokenizer.decode_response", lambda _, prompt, ids: f"say{ids[0]}")
    talk(config_of(models, is_chat=True, greedy=True), "Hi\nand?\n", monkeypatch)
    first, _, second, of_policy = heard
    assert first == "<user>Hi\n<assistant>"
    assert second.startswith("<user>Hi\n<assistant>say") and second.endswith("\n<user>and?\n<assistant>")
    assert second != of_policy


def test_terminal_shows_a_panel_per_model(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = talk(config_of(models), "Once\n", monkeypatch, terminal=True)
    assert "sft" in shown and "policy" in shown and "reward " in shown and " tokens" in shown


def test_model_without_a_chat_template_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "plain", seed=0)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if path.suffix == ".json":
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
        else:
            path.unlink(missing_ok=True)
    config = chat_with_folders([folder])
    assert not config.is_chat and config.models[0].name == "plain"
    settings = config.model_copy(update={"is_chat": True}).canonical_json()
    result = CliRunner().invoke(main, [settings], input="Hi\n")
    assert result.exit_code == 1 and "has no chat template; pass --plain" in result.output
    assert chat_with_folders([models["sft"]]).is_chat


def test_run_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "params.yaml").write_text("preset: x")
    with pytest.raises(InputError, match="has no trained model yet"):
        chat_with_run(tmp_path)


@pytest.mark.parametrize(
    ("text", "shown"),
    [(" a\x1b[2Jb\x07\x9b ", "a�[2Jb��"), ("two\n\tlines", "two\n\tlines"), ("é 你 👩‍🚀 �", "é 你 👩‍🚀 �")],
)
def test_a_terminal_obeys_no_model(text: str, shown: str) -> None:
    assert printable(text) == shown


# Speakers that need no models, and take as long as it takes to type something.
TALKING = """
import time
from components.evaluation import chat

class Fake:
    messages, score = [], None
    def __init__(self, name): self.name, self.text, self.num_tokens = name, "", 0
    def hear(self, line, prompt): self.line = line
    def answer(self, config, seed, on_token):
        for end in range(1, len(self.line) + 1):
            time.sleep(0.02)
            on_token(type("Completion", (), {"response": self.line[:end] + "\\x1b[9A", "response_ids": [0] * end}), False)

chat.Speaker.load = lambda name, folder, config: (time.sleep(0.3), Fake(name))[1]
config = chat.ChatConfig(models=[{"name": n, "folder": "x"} for n in ("SFT", "PPO")], is_chat=False)
chat.main([config.canonical_json()])
"""


def in_terminal(tmp_path: Path, **more: Any) -> Terminal:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return Terminal([sys.executable, "-c", TALKING], cwd=tmp_path, env=environment, **more)


@pytest.mark.parametrize("first", ["typed before the models are loaded", ""])
def test_answers_are_drawn_once_whenever_lines_are_typed(tmp_path: Path, first: str) -> None:
    with in_terminal(tmp_path) as terminal:
        if first:
            terminal.type(f"{first}\n")
        terminal.wait_for("Ctrl-D ends.")
        if not first:
            terminal.wait_for("> ")
            terminal.type("typed when asked\n")
        terminal.wait_for("╭")
        assert not terminal.echoes
        terminal.type("typed meanwhile\n")
        terminal.wait_for("typed meanwhile")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    lines = terminal.screen.lines[terminal.screen.lines.index("The beginning of a text. Ctrl-D ends.") + 1 :]
    assert [line[:1] for line in lines if line] == [">", "╭", "│", "╰", ">", "╭", "│", "╰", ">"]
    assert [lines[0], lines[4]] == [f"> {first or 'typed when asked'}", "> typed meanwhile"]
    assert lines[6].split() == ["│", "typed", "meanwhile�[9A", "││", "typed", "meanwhile�[9A", "│"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_chat_leaves_the_terminal_as_it_was(tmp_path: Path, number: signal.Signals) -> None:
    with in_terminal(tmp_path) as terminal:
        terminal.wait_for("> ")
        terminal.type("a line that takes its time\n")
        terminal.wait_for("╭")
        assert not terminal.echoes
        terminal.send_signal(number)
        terminal.wait()
        assert terminal.echoes
