"""Several rewards at once: every kind by its settings, weights, counts, and the end of their processes."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.rlhf.config.ppo import PpoConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.rewards.rewards import Rewards, open_rewards, weighted_sum
from components.rlhf.text.errors import InputError
from tests.support.reward_server import Logs, RewardServer, chat, completions

FUNCTION = "def score(prompts, responses, columns):\n    return [len(r) + len(c) for r, c in zip(responses, columns)]"


class FixedScorer:
    def __init__(self) -> None:
        self.computed: Any = None

    def score(self, completions: Any, computed: ComputedStates | None = None) -> Tensor:
        self.computed = computed
        return torch.tensor([0.1 * (i + 1) for i in range(len(completions))])


def opened(*rewards: dict[str, Any], folder: Path, scorer: Any = None, code: Path | None = None) -> Rewards:
    config = PpoConfig.model_validate({"rewards": list(rewards), "rollout": {"sampling": {"max_new_tokens": 8}}})
    return open_rewards(
        config.rewards, scorer, max_new_tokens=8, storage=StorageConfig(answers_uri=str(folder)), log=Logs(), code=code
    )


@pytest.fixture
def server() -> Iterator[RewardServer]:
    """A reward server and a language model in one."""

    def answer(body: dict[str, Any]) -> Any:
        return chat("[[5]]") if "messages" in body else {"rewards": [2.0] * len(body["ids"])}

    with RewardServer(answer) as server:
        yield server


def test_every_kind_at_once(server: RewardServer, tmp_path: Path) -> None:
    before = children()  # of tests that ran before in this process
    rewards = opened(
        {"weight": 2.0},
        {"kind": "function", "function": "mine:score", "source": FUNCTION, "weight": 0.5},
        {"kind": "http", "url": server.url, "column": "answer"},
        {"kind": "exact_match"},
        {"kind": "regex", "pattern": r"\d"},
        {"kind": "numeric"},
        {"kind": "json_schema", "schema_text": {"type": "integer"}},
        {"kind": "command", "command": ["grep", "-q", "4"]},
        {"kind": "length", "buffer": 4, "weight": 10},
        {"kind": "repetition", "ngram": 1, "weight": -1},
        {"kind": "endpoint", "url": server.url, "model": "m", "weight": 0},
        folder=tmp_path,
        scorer=FixedScorer(),
    )
    rows = completions("4", "it is 4", ids=[1, 1, 2, 2, 3, 3], answer="4")
    rewards.check_prompts([row.prompt for row in rows])
    parts = rewards.score_parts(rows)
    expected = {
        "reward_model": [0.1, 0.2], "function": [2, 8], "http": [2, 2], "exact_match": [1, 0], "regex": [1, 1], "numeric": [1, 1],
        "json_schema": [1, 0], "command": [1, 1], "length": [-0.5, -0.5], "repetition": [-0.5, -0.5], "endpoint": [0.5, 0.5],
    }  # fmt: skip
    assert {name: scores.tolist() for name, scores in parts.items()} == {
        name: pytest.approx(values) for name, values in expected.items()
    }
    assert list(parts) == list(expected) == list(rewards.weights)
    assert all(scores.dtype == torch.float32 for scores in parts.values())
    # By hand: 2 x 0.1 + 0.5 x 2 + 2 + 1 + 1 + 1 + 1 + 1 - 5 + 0.5, and 2 x 0.2 + 0.5 x 8 + 2 + 0 + 1 + 1 + 0 + 1 - 5 + 0.5
    assert weighted_sum(parts, rewards.weights).tolist() == pytest.approx([3.7, 4.9])
    counts = rewards.take_counts()
    assert counts["endpoint/requests"] == 2 and counts["numeric/failed"] == 0
    assert set(rewards.take_counts()) == set(counts) and not any(rewards.take_counts().values())
    rewards.close()
    rewards.close()
    assert set(children()) <= set(before)


def children() -> list[str]:
    """The commands of our programs that run as children of this process."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if "components.rlhf.rewards" in line]


def test_reward_model_alone_is_unchanged(tmp_path: Path) -> None:
    """Bit for bit, and it gets what the caller has computed."""
    scorer = FixedScorer()
    rewards = opened({}, folder=tmp_path, scorer=scorer)
    computed: Any = object()
    rows = completions("a", "b", "c")
    parts = rewards.score_parts(rows, computed)
    assert scorer.computed is computed and rewards.take_counts() == {}
    assert torch.equal(weighted_sum(parts, rewards.weights), scorer.score(rows))
    rewards.check_prompts([row.prompt for row in rows])
    rewards.close()


def test_reward_model_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="The reward reward_model needs the reward model of the run, and there is none"
    ):
        opened({}, folder=tmp_path)


def test_missing_column_is_found_before_training(tmp_path: Path) -> None:
    rewards = opened({"kind": "regex", "pattern": "a"}, {"kind": "exact_match", "name": "exact"}, folder=tmp_path)
    prompts = [row.prompt for row in completions("a", "b", "c", answer=["1", " ", "2"])]
    with pytest.raises(
        InputError, match=r"^The reward exact needs the column answer, which is empty in the data of prompt p1"
    ):
        rewards.check_prompts(prompts)
    rewards.close()


def test_code_reaches_functions_and_commands(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(p, r):\n    return [3.0 for _ in r]")
    (tmp_path / "check").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "check").chmod(0o755)
    rewards = opened(
        {"kind": "function", "function": "mine:score"},
        {"kind": "command", "command": ["check"]},
        folder=tmp_path,
        code=tmp_path,
    )
    parts = rewards.score_parts(completions("a"))
    assert {name: scores.tolist() for name, scores in parts.items()} == {"function": [3.0], "command": [1.0]}
    rewards.close()


@given(
    st.lists(
        st.tuples(st.floats(-4, 4, width=16), st.lists(st.floats(-8, 8, width=16), min_size=3, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_weighted_sum_is_that_of_a_slow_version(rewards: list[tuple[float, list[float]]]) -> None:
    parts = {str(i): torch.tensor(scores) for i, (_, scores) in enumerate(rewards)}
    weights = {str(i): weight for i, (weight, _) in enumerate(rewards)}
    expected = [sum(weight * scores[row] for weight, scores in rewards) for row in range(3)]
    assert weighted_sum(parts, weights).tolist() == pytest.approx(expected, abs=1e-5)


def test_settings_of_the_documentation_are_valid() -> None:
    """Every params snippet of docs/rewards.md."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    snippets = [part.partition("```")[0] for part in page.split("```yaml\n")[1:]]
    kinds = set()
    for snippet in snippets:
        ppo = yaml.safe_load(snippet)["ppo"]
        kinds |= {reward.kind for reward in PpoConfig.model_validate(ppo).rewards}
    assert len(kinds) == 12
