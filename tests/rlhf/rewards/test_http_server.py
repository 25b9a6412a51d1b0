"""The reward that a server computes: what it is sent, and every way in which it fails."""

import json
import socket
import threading
from typing import Any

import pytest

from components.rlhf.config.rewards import HttpReward
from components.rlhf.rewards import posting
from components.rlhf.rewards.http_server import HttpScorer
from components.rlhf.rewards.owner import Owner
from components.rlhf.text.errors import InputError, RetryableError
from tests.support.judge_server import Reply
from tests.support.reward_server import Logs, RewardServer, completions

OWNER = Owner(title="reward safety", key="ppo.rewards.1")


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "SECONDS", 0.01)


def scorer_of(server: RewardServer | str, **config: Any) -> HttpScorer:
    url = server if isinstance(server, str) else server.url
    return HttpScorer(HttpReward(kind="http", url=url, **{"max_retries": 1, **config}), Logs(), OWNER)


def length(body: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": [len(response) for response in body["responses"]]}


def test_request_and_scores() -> None:
    with RewardServer(length) as server:
        scores = scorer_of(server, column="answer").score(completions("a", "bb", answer=["x", "y"], source="s"))
    assert scores.tolist() == [1.0, 2.0]
    assert server.requests == [
        {
            "query": ["prompt 0 a", "prompt 1 bb"],
            "prompts": ["prompt 0 ", "prompt 1 "],
            "responses": ["a", "bb"],
            "labels": ["x", "y"],
            "columns": [{"answer": "x", "source": "s"}, {"answer": "y", "source": "s"}],
            "ids": [0, 1],
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_server_of_openrlhf() -> None:
    """One that reads query, prompts and labels alone, and answers with more than rewards."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        rewards = [
            float(len(q) - len(p)) for q, p, _ in zip(body["query"], body["prompts"], body["labels"], strict=True)
        ]
        return {"rewards": rewards, "scores": [0.5] * len(rewards), "extra_logs": {"n": 1}}

    with RewardServer(answer) as server:
        assert scorer_of(server).score(completions("a", "bb")).tolist() == [1.0, 2.0]
    assert server.requests[0]["labels"] == ["", ""]


def test_batches_keep_their_order_and_are_limited() -> None:
    """Later batches answer sooner."""
    responses = ["x" * (i + 1) for i in range(23)]

    def answer(body: dict[str, Any]) -> Reply:
        content = json.dumps(length(body) | {"ids": body["ids"]}).encode()
        return Reply(body=content, seconds=0.1 if body["ids"][0] == 0 else 0.01)

    with RewardServer(answer) as server:
        scores = scorer_of(server, batch_size=5, max_concurrency=2).score(completions(*responses))
    assert scores.tolist() == list(range(1, 24))
    assert sorted(len(request["ids"]) for request in server.requests) == [3, 5, 5, 5, 5]
    assert server.most_at_a_time == 2


def test_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with RewardServer(length, token="hunter2") as server:
        monkeypatch.setenv("REWARD_TOKEN", "hunter2")
        assert scorer_of(server, token_variable="REWARD_TOKEN").score(completions("a")).tolist() == [1.0]
        monkeypatch.setenv("REWARD_TOKEN", "other")
        with pytest.raises(InputError, match="correct the API key in REWARD_TOKEN") as error:
            scorer_of(server, token_variable="REWARD_TOKEN").score(completions("a"))
        assert "other" not in str(error.value)
        monkeypatch.delenv("REWARD_TOKEN")
        with pytest.raises(InputError, match="set the environment variable REWARD_TOKEN"):
            scorer_of(server, token_variable="REWARD_TOKEN").score(completions("a"))
        with pytest.raises(InputError, match=r"set ppo.rewards.1.token_variable to the environment variable"):
            scorer_of(server).score(completions("a"))


def test_failure_of_one_attempt_is_retried() -> None:
    replies = iter([Reply(status=503), Reply(body=b"<html>"), {"rewards": [1.0]}, {"rewards": [3.0, 4.0]}])
    with RewardServer(lambda body: next(replies)) as server:
        assert scorer_of(server, max_retries=3).score(completions("a", "b")).tolist() == [3.0, 4.0]
    assert len(server.requests) == 4


WRONG: list[tuple[Any, str]] = [
    ({"rewards": [1.0]}, "answers 1 rewards for 2 responses; correct the server, or ppo.rewards.1.url"),
    ({"rewards": [1.0, 2.0, 3.0]}, "answers 3 rewards for 2 responses"),
    ({"rewards": []}, "answers 0 rewards for 2 responses"),
    (Reply(body=b'{"rewards": [1.0, NaN]}'), "does not answer with JSON (NaN is not a JSON number"),
    (Reply(body=b'{"rewards": [1.0, 1e999]}'), "does not answer with JSON (the number 1e999 is too large"),
    ({"rewards": [1.0, 1e39]}, "answers '1e+39' for the response 'two', which is no number"),
    ({"rewards": [1.0, None]}, "answers 'None' for the response 'two', which is no number"),
    ({"rewards": ["1", 2]}, "answers '1' for the response 'one', which is no number"),
    ({"rewards": [True, 2]}, "answers 'True' for the response 'one', which is no number"),
    ({"rewards": [[1.0], [2.0]]}, "answers '[1.0]' for the response 'one', which is no number"),
    ({"rewards": {"0": 1.0}}, "answers without a list of rewards"),
    ({"scores": [1.0, 2.0]}, "answers without a list of rewards"),
    ([1.0, 2.0], "answers without a list of rewards ('[1.0, 2.0]')"),
    ({"rewards": [1.0, 2.0], "ids": [1, 0]}, "answers with other ids than those of the request"),
    ({"rewards": [1.0, 2.0], "ids": [0]}, "answers with other ids than those of the request"),
    ({"rewards": [1.0, 2.0], "ids": ["0", "1"]}, "answers with other ids than those of the request"),
    (Reply(body=b""), "does not answer with JSON"),
    (Reply(body=b"<html>hello"), "it answers '<html>hello'"),
    (Reply(status=500, body=b"out of memory"), "answers 500 (out of memory) after 1 retries"),
    (Reply(status=429), "lower ppo.rewards.1.max_concurrency"),
    (Reply(status=404), "correct ppo.rewards.1.url"),
    (Reply(status=400, body=b'{"error": "too long"}'), "rejects the request (400: too long); correct the settings ppo.rewards.1"),
    (Reply(status=307, headers=(("Location", "http://127.0.0.1:1/"),)), "correct ppo.rewards.1.url"),
    (Reply(seconds=1.0), "did not answer within 0.3 seconds; raise ppo.rewards.1.timeout_seconds"),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_failure_is_one_sentence_that_names_the_reward(reply: Any, message: str) -> None:
    with RewardServer(lambda body: reply) as server, pytest.raises(InputError) as error:
        scorer_of(server, timeout_seconds=0.3).score(completions("one", "two"))
    text = str(error.value)
    assert text.startswith("The reward safety: http://127.0.0.1") and message in text
    assert text.endswith(".") and text.isprintable() and len(text) < 600


def test_server_that_is_down_may_be_up_later() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(
        RetryableError, match=r"^The reward safety: .* cannot be reached .*; correct ppo.rewards.1.url, or"
    ):
        scorer_of(url).score(completions("a"))


def test_failing_batch_ends_the_others() -> None:
    """Their retries do not go on for minutes."""
    served = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        served.set()
        return {"rewards": [1.0]} if body["ids"][0] == 0 else length(body)

    with RewardServer(answer) as server, pytest.raises(InputError, match="answers 1 rewards for 2 responses"):
        scorer_of(server, batch_size=2, max_concurrency=1, max_retries=0).score(completions(*map(str, range(40))))
    assert served.is_set() and len(server.requests) < 20


def test_missing_label_is_refused_before_anything_is_sent() -> None:
    with (
        RewardServer(length) as server,
        pytest.raises(InputError, match="needs the column answer, which is missing in the data of"),
    ):
        scorer_of(server, column="answer").score(completions("a", target="x"))
    assert server.requests == []


def test_no_responses_send_nothing() -> None:
    assert scorer_of("http://127.0.0.1:1").score([]).shape == (0,)
