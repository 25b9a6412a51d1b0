"""Environments of the user live in processes of their own, and fail alone."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.environment import FunctionEnvironment
from components.rlhf.data.records import Prompt
from components.rlhf.environments import user
from components.rlhf.environments.protocol import Step
from components.rlhf.environments.user import UserHost

SOURCE = """
import os, sys, time

class Game:
    def reset(self, prompt, columns):
        print("reset")
        if prompt == "broken":
            raise ValueError("no such\\ngame")
        self.said, self.columns = [prompt], columns

    def step(self, text):
        self.said.append(text)
        if text == "raise":
            raise RuntimeError("oh no")
        if text == "exit":
            sys.exit(3)
        if text == "end":
            os._exit(1)
        if text == "sleep":
            time.sleep(60)
        if text == "deaf":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
        if text == "three":
            return "too", "many"
        if text == "number":
            return 5, 1.0, False
        if text == "nan":
            return "", float("nan"), False
        if text == "half":
            return "\\ud800", 0, 0
        return "|".join(self.said) + str(self.columns), len(self.said), text == "stop"

def not_a_class():
    return 5
"""


def host_of(**config: Any) -> UserHost:
    settings = {"kind": "function", "function": "mine:Game", "source": SOURCE, "timeout_seconds": 0.3}
    return UserHost(FunctionEnvironment(**(settings | config)))


@pytest.fixture(scope="module")
def host() -> Iterator[UserHost]:
    made = host_of(num_processes=1)
    yield made
    made.close()


def begin(host: UserHost, *prompts: str) -> None:
    assert host.reset({i: Prompt(prompt=p, columns={"answer": "7"}) for i, p in enumerate(prompts)}) == {}


def test_each_response_has_an_environment_of_its_own_that_remembers(host: UserHost) -> None:
    begin(host, "a", "b")
    first = host.step({0: "x", 1: "y"})
    assert first[0] == Step(observation="a|x{'answer': '7'}", reward=2.0, done=False)
    assert first[1].observation.startswith("b|y")
    assert host.step({1: "stop"})[1] == Step(observation="b|y|stop{'answer': '7'}", reward=3.0, done=True)
    assert host.step({0: "z"})[0].observation.startswith("a|x|z")
    begin(host, "c")  # in place of the first
    assert host.step({0: "x"})[0].observation.startswith("c|x")
    host.end([0, 1])
    assert host.step({0: "x"})[0].failure


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("raise", "raised RuntimeError: oh no"),
        ("exit", "raised SystemExit: 3"),
        ("sleep", "timed out after 0.3 seconds"),
        ("three", "answered ('too', 'many'), not (observation, reward, done) with a text and a number"),
        ("number", "answered (5, 1.0, False), not (observation, reward, done) with a text and a number"),
        ("nan", "gave the reward nan"),
    ],
)
def test_call_that_fails_fails_its_response_alone(host: UserHost, text: str, failure: str) -> None:
    begin(host, "a", "b", "c")
    found = host.step({0: "x", 1: text, 2: "y"})
    assert found[1].failure == failure
    assert found[0].observation.startswith("a|x") and found[2].observation.startswith("c|y")
    assert host.step({0: "x"})[0].reward == 3.0


def test_reset_that_fails_names_its_response(host: UserHost) -> None:
    prompts = {0: Prompt(prompt="a"), 5: Prompt(prompt="broken")}
    assert host.reset(prompts) == {5: "raised ValueError: no such game"}
    assert host.step({0: "x"})[0].observation == "a|x{}"


def test_half_a_character_is_replaced(host: UserHost) -> None:
    begin(host, "a")
    assert host.step({0: "half"})[0] == Step(observation="?", reward=0.0, done=False)


@pytest.mark.parametrize(
    ("text", "failure"),
    [("end", "ended its process"), ("deaf", "timed out after 0.3 seconds, and could not be interrupted")],
)
def test_process_that_ends_takes_its_own_environments_along_and_no_others(
    monkeypatch: pytest.MonkeyPatch, text: str, failure: str
) -> None:
    monkeypatch.setattr(user, "GRACE_SECONDS", 0.3)
    host = host_of(num_processes=2)
    begin(host, "a", "b", "c")
    started = time.monotonic()
    found = host.step({0: text, 1: "x", 2: "y"})  # 0 and 2 share a process
    assert found[0].failure == failure
    assert found[2].failure == "was lost when the process that it shared with others ended"
    assert found[1].observation.startswith("b|x")
    begin(host, "d")  # a new process
    assert host.step({0: "x"})[0].observation.startswith("d|x")
    host.close()
    assert time.monotonic() - started < 10


def test_class_that_cannot_be_used_fails_every_response() -> None:
    for function, failure in (
        ("mine:Nowhere", "raised AttributeError: "),
        ("mine:not_a_class", "raised AttributeError: 'int' object"),
    ):
        host = host_of(function=function, num_processes=1)
        found = host.reset({0: Prompt(prompt="a"), 1: Prompt(prompt="b")})
        host.close()
        assert set(found) == {0, 1} and all(text.startswith(failure) for text in found.values()), found


def test_class_in_a_folder_of_code_imports_its_neighbors(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from words import Base\nclass Game(Base):\n    pass\n")
    (tmp_path / "words.py").write_text(SOURCE.replace("class Game", "class Base"))
    settings = {"kind": "function", "function": "mine:Game", "num_processes": 1}
    host = UserHost(FunctionEnvironment(**settings), code=tmp_path)
    assert host.reset({0: Prompt(prompt="a")}) == {}
    assert host.step({0: "x"})[0].observation == "a|x{}"
    host.close()
