"""Answers of endpoint judges in S3 and in folders."""

from pathlib import Path

import pytest

from components.rlhf.config.storage import StorageConfig
from components.rlhf.rewards import answers as module
from components.rlhf.rewards.answers import Answer, default_answers_uri, open_answers, request_digest
from tests.support.limited_s3 import LimitedS3

YES = Answer(content="[[A]] naïve 映画", finish_reason="stop", input_tokens=3, output_tokens=2)


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)


def test_answers_in_s3_are_found_by_the_next_process() -> None:
    with LimitedS3() as server:
        storage = StorageConfig(answers_uri="s3://bucket/answers", endpoint_url=server.url, retry_minutes=0.01)
        first = open_answers(storage, "gpt", print)
        first.put("key", YES)
        first.flush()
        assert open_answers(storage, "gpt", print).get("key") == YES
        assert open_answers(storage, "other", print).get("key") is None


def test_s3_that_is_down_is_one_warning_and_loses_no_answer_of_this_process() -> None:
    with LimitedS3() as server:
        url = server.url
    log: list[str] = []
    storage = StorageConfig(answers_uri="s3://bucket/answers", endpoint_url=url, retry_minutes=0.001)
    cache = open_answers(storage, "gpt", log.append)
    cache.put("key", YES)
    cache.flush()
    assert cache.get("key") == YES
    warnings = [
        line
        for line in log
        if line.startswith("warning: the answers of endpoints cannot be kept in s3://bucket/answers")
    ]
    assert len(warnings) == 1 and "all answers are asked for" in warnings[0]


def test_answers_are_written_while_a_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process loses at most FLUSH_SECONDS of answers."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    storage = StorageConfig(answers_uri=str(tmp_path))
    running = open_answers(storage, "gpt", print)
    for number in range(5):
        running.put(str(number), YES)
    found = open_answers(storage, "gpt", print)
    assert [found.get(str(number)) for number in range(5)] == [YES] * 5


def test_long_runs_write_new_files_instead_of_one_that_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1.0)
    monkeypatch.setattr(module, "MAX_FILE_ANSWERS", 3)
    storage = StorageConfig(answers_uri=str(tmp_path))
    running = open_answers(storage, "gpt", print)
    for number in range(8):
        running.put(f"key {number}", YES)
    running.flush()
    assert sorted(len(path.read_text().splitlines()) for path in tmp_path.rglob("*.jsonl")) == [2, 3, 3]
    later = open_answers(storage, "gpt", print)
    for cache in (running, later):
        assert all(cache.get(f"key {number}") == YES for number in range(8))


def test_default_location_is_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_answers_uri() == str(tmp_path / "kfp-rlhf" / "answers")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_answers_uri() == "/home/someone/.cache/kfp-rlhf/answers"


def test_digest_depends_on_everything_in_the_request_and_not_on_the_order_of_keys() -> None:
    body = {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": "é"}]}
    digest = request_digest("http://a/v1", body)
    assert digest == request_digest("http://a/v1", dict(reversed(body.items())))
    others = [request_digest("http://b/v1", body), *(request_digest("http://a/v1", body | {key: "x"}) for key in body)]
    assert len({digest, *others}) == 5
