"""The endpoint judge and the endpoint reward against vLLM's own OpenAI-compatible server, on a CPU with a small random model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.config.rewards import EndpointReward
from components.rlhf.config.storage import StorageConfig
from components.rlhf.rewards.answers import open_answers
from components.rlhf.rewards.endpoint import EndpointJudge
from components.rlhf.rewards.grades import GradeScorer
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.protocol import Preferences
from components.rlhf.text.errors import InputError
from tests.support.ppo_runs import completion
from tests.support.tiny_model import make_tiny_model

pytestmark = pytest.mark.vllm
CHOICE = {"structured_outputs": {"choice": ["[[A]]", "[[B]]", "[[C]]"]}}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with an API key, which takes half a minute to start."""
    folder = make_tiny_model(tmp_path_factory.mktemp("vllm") / "model", seed=0, hidden_size=128)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--served-model-name", "judge", "--max-model-len", "2048", "--api-key", "right-key", "--enforce-eager"]
    log = folder.parent / "log"
    with log.open("w") as file:
        server = subprocess.Popen(
            command, stdout=file, stderr=file, env=os.environ | ENVIRONMENT, start_new_session=True
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=60)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "right-key")


def compare(url: str, folder: Path, **config: Any) -> Preferences:
    settings = EndpointConfig(
        kind="endpoint",
        url=url,
        **({"model": "judge", "max_tokens": 8, "max_retries": 1, "api_key_variable": "OPENAI_API_KEY"} | config),
    )
    judge = EndpointJudge(settings, open_answers(StorageConfig(answers_uri=str(folder)), "judge", print), print)
    first, second = (
        [replace(completion([1], [2], prompt=f"prompt {i}"), response=text) for i, text in enumerate(texts)]
        for texts in (["a good film", "fun", "the same"], ["a bad film", "dull", "the same"])
    )
    return judge.compare(first, second)


def test_answers_within_a_choice_are_verdicts(url: str, tmp_path: Path) -> None:
    found = compare(url, tmp_path, extra_body=CHOICE)
    assert set(found.wins.tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert found.wins[2] == 0.5
    assert (found.counts["requests"], found.counts["unreadable"]) == (4, 0)
    assert found.counts["input_tokens"] > 4 * 500 and found.counts["output_tokens"] > 0
    again = compare(url, tmp_path, extra_body=CHOICE)
    assert again.wins.tolist() == found.wins.tolist()
    assert again.counts["requests"] == 0


def test_temperature_0_gives_the_same_answers_without_the_cache(url: str, tmp_path: Path) -> None:
    runs = [compare(url, tmp_path / name, extra_body=CHOICE).wins.tolist() for name in ("one", "two")]
    assert runs[0] == runs[1]


def test_free_text_of_a_random_model_is_unreadable(url: str, tmp_path: Path) -> None:
    found = compare(url, tmp_path)
    assert found.wins[:2].isnan().all()
    assert found.counts["unreadable"] == 4


def test_too_long_question_is_rejected_by_the_server_alone(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rejects the request \(400: .*2048.*\); correct the settings of the judge"):
        compare(url, tmp_path, rubric="long " * 1000)


def test_wrong_key_and_wrong_model(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"answers 404 \(.*other.*\); correct judge.url or judge.model"):
        compare(url, tmp_path, model="other")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    with pytest.raises(InputError, match=r"answers 401 .*; correct the API key in OPENAI_API_KEY"):
        compare(url, tmp_path)


def grade(url: str, folder: Path, **config: Any) -> list[float]:
    settings = EndpointReward(
        kind="endpoint",
        url=url,
        model="judge",
        max_tokens=8,
        max_retries=1,
        api_key_variable="OPENAI_API_KEY",
        **config,
    )
    answers = open_answers(StorageConfig(answers_uri=str(folder)), "grades", print)
    scorer = GradeScorer(settings, answers, print, Owner(title="reward grade", key="ppo.rewards.0"))
    rows = [
        replace(completion([1], [2], prompt=f"prompt {i}"), response=text) for i, text in enumerate(["fun", "dull", ""])
    ]
    scores: list[float] = scorer.score(rows).tolist()
    scorer.close()
    return scores


def test_grades_of_a_server(url: str, tmp_path: Path) -> None:
    choice = {"structured_outputs": {"choice": [f"[[{n}]]" for n in (0, 5, 10)]}}
    scores = grade(url, tmp_path, extra_body=choice)
    assert set(scores) <= {0.0, 0.5, 1.0} and grade(url, tmp_path, extra_body=choice) == scores
    with pytest.raises(InputError, match=r"^The reward grade is of no use: 3 of 3 responses got no grade from judge"):
        grade(url, tmp_path)
