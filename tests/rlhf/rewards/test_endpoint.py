import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.records import Completion, Conversation, Message, Prompt
from components.rlhf.rewards import posting as module
from components.rlhf.rewards.answers import Answer, open_answers
from components.rlhf.rewards.endpoint import EndpointJudge, read_verdict
from components.rlhf.rewards.protocol import Preferences
from components.rlhf.text.errors import InputError, RetryableError
from tests.support.judge_server import JudgeServer, Reply, prefers, refusal

KEY = "OPENAI_API_KEY"


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries wait 20 times less; nothing else changes. No API key of this machine is sent."""
    monkeypatch.setattr(module, "SECONDS", 0.05)
    monkeypatch.delenv(KEY, raising=False)


class Logs(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def judge_of(server: JudgeServer | str, folder: Path, *, log: Logs | None = None, **config: Any) -> EndpointJudge:
    url = server if isinstance(server, str) else server.url
    options = {"max_retries": 2, "api_key_variable": KEY} | config
    settings = EndpointConfig(kind="endpoint", url=url, model="stub", **options)
    log = Logs() if log is None else log
    return EndpointJudge(settings, open_answers(StorageConfig(answers_uri=str(folder)), "stub", log), log)


def completions(*responses: str, prompt: Prompt | None = None) -> list[Completion]:
    return [
        Completion(
            prompt=prompt or Prompt(prompt=f"question {i}"),
            prompt_ids=[1],
            response_ids=[2],
            response=response,
            logprobs=None,
            truncated=False,
        )
        for i, response in enumerate(responses)
    ]


def compare(judge: EndpointJudge, first: list[str], second: list[str]) -> Preferences:
    return judge.compare(completions(*first), completions(*second))


def wins(preferences: Preferences) -> list[float | None]:
    return [None if math.isnan(win) else win for win in preferences.wins.tolist()]


# --- verdicts ---


def test_known_preferences_are_recovered(tmp_path: Path) -> None:
    """The server prefers longer responses: the first wins, loses, ties by the server, and is equal (which is not asked)."""
    with JudgeServer(prefers(len)) as server:
        found = compare(
            judge_of(server, tmp_path), ["long one", "no", "four", "same"], ["no", "long one", "fore", "same"]
        )
        assert wins(found) == [1.0, 0.0, 0.5, 0.5]
        assert found.consistent.tolist() == [True] * 4
        assert len(server.requests) == 6  # both orders of three pairs
    assert found.counts == {
        "requests": 6, "cached": 0, "refused": 0, "unreadable": 0, "rejected": 0, "input_tokens": 600, "output_tokens": 60, "cost": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("position", "expected"), [("A", 0.5), ("B", 0.5)])
def test_judge_that_prefers_a_position_gives_inconsistent_ties(tmp_path: Path, position: str, expected: float) -> None:
    with JudgeServer(lambda *_: f"[[{position}]]") as server:
        found = compare(judge_of(server, tmp_path), ["x", "y"], ["a", "b"])
    assert wins(found) == [expected] * 2
    assert found.consistent.tolist() == [False, False]


def test_tie_in_one_order_is_three_quarters_of_a_win(tmp_path: Path) -> None:
    with JudgeServer(lambda _prompt, a, _b: "[[A]]" if a == "good" else "[[C]]") as server:
        found = compare(judge_of(server, tmp_path), ["good"], ["bad"])
    assert wins(found) == [0.75]
    assert found.consistent.tolist() == [False]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[[A]]", 1.0),
        ("[[B]]", 0.0),
        ("[[C]]", 0.5),
        ("[[tie]]", 0.5),
        ("Response [[A]] is short, so [[B]]", 0.0),  # the one at the end counts
        ("[[A]] would be wrong because the reply is rude; so B wins", None),
        ("I may answer [[A]], [[B]] or [[C]]. First, Response", None),
        ("A is better because it is correct.\n\n**[[ a ]]**", 1.0),
        ("A", 1.0),
        (" B.\n", 0.0),
        ("**C**", 0.5),
        ("Response B", 0.0),
        ("Answer: A", 1.0),
        ("", None),
        ("A good answer", None),
        ("Both", None),
        ("[[D]]", None),
        ("I cannot compare these.", None),
        ("AB", None),
        ("C3PO", None),
    ],
)
def test_read_verdict(content: str, expected: float | None) -> None:
    assert read_verdict(Answer(content=content)) == expected


def test_answer_that_was_cut_has_no_verdict() -> None:
    assert read_verdict(Answer(content="It is either [[A]] or [[B]]", finish_reason="length")) is None


def test_refused_answer_has_no_verdict() -> None:
    assert read_verdict(Answer(content="[[A]]", refused=True)) is None


@given(st.text(max_size=60))
def test_any_text_is_a_verdict_or_none(content: str) -> None:
    assert read_verdict(Answer(content=content)) in (None, 0.0, 0.5, 1.0)


def test_unreadable_and_refused_answers_give_no_answer_for_the_pair(tmp_path: Path) -> None:
    """One order is enough to lose a pair; the others keep their verdicts."""

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        if prompt == "question 0":
            return "what?" if a == "x0" else "[[B]]"
        if prompt == "question 1":
            return Reply(message={"role": "assistant", "content": None, "refusal": "I cannot help with that"})
        if prompt == "question 2":
            return Reply(message={"role": "assistant", "content": ""}, finish_reason="content_filter")
        return prefers(len)(prompt, a, b)

    with JudgeServer(answer) as server:
        found = compare(judge_of(server, tmp_path), ["x0", "x1", "x2", "longest"], ["y0", "y1", "y2", "short"])
    assert wins(found) == [None, None, None, 1.0]
    assert found.num_unanswered == 3
    assert (found.counts["unreadable"], found.counts["refused"]) == (1, 4)


def test_one_rejected_request_loses_one_pair(tmp_path: Path) -> None:
    def answer(prompt: str, a: str, b: str) -> str | Reply:
        return refusal(400, "context length exceeded") if prompt == "question 0" else prefers(len)(prompt, a, b)

    with JudgeServer(answer) as server:
        found = compare(judge_of(server, tmp_path), ["a", "longer"], ["b", "b"])
    assert wins(found) == [None, 1.0]
    assert found.counts["rejected"] == 2


# --- requests ---


def test_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, " my-key\n")
    extra: dict[str, Any] = {"reasoning_effort": "low", "max_tokens": None, "max_completion_tokens": 99}
    with JudgeServer(prefers(len), key="my-key") as server:
        compare(
            judge_of(server, tmp_path, rubric="Be kind.\n", extra_body=extra),
            ["one"],
            ["four"],
        )
        bodies = sorted(server.requests, key=lambda body: body["messages"][1]["content"].index("one"))
    straight, swapped = (body["messages"][1]["content"] for body in bodies)
    assert straight.startswith("[Prompt]\nquestion 0\n\n[Response A]\none\n[End of response A]\n\n[Response B]\nfour\n")
    assert swapped.startswith("[Prompt]\nquestion 0\n\n[Response A]\nfour\n[End of response A]\n\n[Response B]\none\n")
    for body in bodies:
        assert body["messages"][0] == {"role": "system", "content": "Be kind."}
        assert {k: v for k, v in body.items() if k != "messages"} == {
            "model": "stub", "temperature": 0, "max_completion_tokens": 99, "reasoning_effort": "low",
        }  # fmt: skip


def test_default_rubric_is_that_of_the_package(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        compare(judge_of(server, tmp_path), ["a"], ["bc"])
        assert "which one is better" in server.requests[0]["messages"][0]["content"]


def test_conversation_is_shown_with_roles(tmp_path: Path) -> None:
    messages = (Message(role="system", content="Be brief."), Message(role="user", content="Why?"))
    prompt = Prompt(prompt="<|im_start|>...", conversation=Conversation(messages=messages))
    with JudgeServer(prefers(len)) as server:
        judge_of(server, tmp_path).compare(completions("a", prompt=prompt), completions("bc", prompt=prompt))
        content = server.requests[0]["messages"][1]["content"]
    assert content.startswith("[Prompt]\nSystem: Be brief.\n\nUser: Why?\n\n[Response A]")


def test_no_key_is_sent_if_the_variable_is_unset(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        compare(judge_of(server, tmp_path), ["a"], ["bc"])
        assert all("Authorization" not in headers for headers in server.headers)


def test_concurrency_and_rate_are_limited(tmp_path: Path) -> None:
    with JudgeServer(lambda *_: Reply(seconds=0.1)) as server:
        compare(judge_of(server, tmp_path / "a", max_concurrency=3), ["x"] * 6, ["y"] * 6)
        assert 2 <= server.most_at_a_time <= 3
    with JudgeServer(prefers(len)) as server:
        compare(judge_of(server, tmp_path / "b", requests_per_minute=1200), ["x"] * 5, ["yy"] * 5)
        assert server.times[-1] - server.times[0] >= 9 * 0.05 - 0.02


def test_cost_is_that_of_the_tokens(tmp_path: Path) -> None:
    """Two requests of 100 and 10 tokens at 3 and 15 a million."""
    with JudgeServer(prefers(len)) as server:
        found = compare(judge_of(server, tmp_path, input_price=3, output_price=15), ["a"], ["bc"])
    assert found.counts["cost"] == pytest.approx((200 * 3 + 20 * 15) / 1e6)


# --- the cache ---


def test_rerun_asks_nothing(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        first = compare(judge_of(server, tmp_path), ["long one", "no"], ["no", "long one"])
        again = compare(judge_of(server, tmp_path), ["long one", "no"], ["no", "long one"])
        assert len(server.requests) == 4
    assert wins(first) == wins(again) == [1.0, 0.0]
    assert (again.counts["requests"], again.counts["cached"], again.counts["input_tokens"]) == (0, 4, 0)


def test_another_rubric_model_or_server_asks_again(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server, JudgeServer(prefers(len)) as other:
        for judge in (
            judge_of(server, tmp_path),
            judge_of(server, tmp_path, rubric="Other."),
            judge_of(server, tmp_path, extra_body={"seed": 1}),
            judge_of(other, tmp_path),
        ):
            compare(judge, ["a"], ["bc"])
        assert (len(server.requests), len(other.requests)) == (6, 2)


def test_answers_that_were_paid_for_survive_a_failure(tmp_path: Path) -> None:
    """The server dies after five answers; a rerun asks only for the others."""
    seen = threading.Semaphore(5)

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        return prefers(len)(prompt, a, b) if seen.acquire(blocking=False) else refusal(503, "overloaded")

    with JudgeServer(answer) as server:
        with pytest.raises(RetryableError, match=r"answers 503 \(overloaded\) after 2 retries"):
            compare(judge_of(server, tmp_path, max_concurrency=1), ["aa"] * 5, ["b"] * 5)
        server.answer = prefers(len)
        found = compare(judge_of(server, tmp_path), ["aa"] * 5, ["b"] * 5)
    assert wins(found) == [1.0] * 5
    assert (found.counts["cached"], found.counts["requests"]) == (5, 5)


def test_answers_on_their_way_when_another_request_fails_are_kept(tmp_path: Path) -> None:
    def answer(prompt: str, a: str, b: str) -> str | Reply:
        if prompt == "question 0":
            return refusal(401, "no key")
        return Reply(message={"role": "assistant", "content": "[[A]]"}, seconds=0.5)

    with JudgeServer(answer) as server:
        with pytest.raises(InputError, match="answers 401"):
            compare(judge_of(server, tmp_path, max_concurrency=6), ["a", "b", "c"], ["x", "y", "z"])
        asked = sum("question 0" not in body["messages"][1]["content"] for body in server.requests)
        server.answer = prefers(len)
        found = compare(judge_of(server, tmp_path), ["a", "b", "c"], ["x", "y", "z"])
    assert asked > 0 and found.counts["cached"] == asked


def test_two_runs_share_a_location(tmp_path: Path) -> None:
    """Both write at the same time, and a third one finds the answers of both."""
    with JudgeServer(prefers(len)) as server:
        judges = [judge_of(server, tmp_path) for _ in range(2)]
        threads = [
            threading.Thread(target=compare, args=(judge, [f"{i}xx"] * 3, ["y"] * 3)) for i, judge in enumerate(judges)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        count = len(server.requests)
        found = judge_of(server, tmp_path).compare(completions("0xx", "1xx"), completions("y", "y"))
        assert len(server.requests) == count
    assert found.counts["cached"] == 4


def test_damaged_cache_is_asked_again(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        compare(judge_of(server, tmp_path), ["a", "b"], ["cc", "dd"])
        [file] = (tmp_path / "stub").iterdir()
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0][:-9], "[1]", json.dumps({"key": 1}), *lines[1:]]))
        found = compare(judge_of(server, tmp_path), ["a", "b"], ["cc", "dd"])
    assert (found.counts["cached"], found.counts["requests"]) == (3, 1)
    assert wins(found) == [0.0, 0.0]


def test_cache_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = Logs()
    with JudgeServer(prefers(len)) as server:
        found = compare(judge_of(server, tmp_path / "file", log=log), ["a"], ["cc"])
    assert wins(found) == [0.0]
    warnings = [line for line in log if line.startswith("warning: ")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: the answers of endpoints cannot be kept in ")
    assert "asking stub 2 questions; 0 are answered in the cache" in log


# --- failures ---


@pytest.fixture(params=["down", "no such host"])
def dead_url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "no such host":
        yield "http://judge.invalid/v1"
        return
    with JudgeServer(prefers(len)) as server:
        url = server.url
    yield url


def test_endpoint_that_is_down(tmp_path: Path, dead_url: str) -> None:
    with pytest.raises(
        RetryableError, match=r"chat/completions cannot be reached \(.+\); correct judge.url, or try again later\.$"
    ):
        compare(judge_of(dead_url, tmp_path), ["a"], ["b"])


def test_slow_endpoint(tmp_path: Path) -> None:
    with (
        JudgeServer(lambda *_: Reply(seconds=3)) as server,
        pytest.raises(RetryableError, match="did not answer within 0.3 seconds; raise judge.timeout_seconds"),
    ):
        compare(judge_of(server, tmp_path, timeout_seconds=0.3, max_retries=0), ["a"], ["b"])


def test_rate_limit_is_obeyed(tmp_path: Path) -> None:
    """Two requests are answered 429 with Retry-After, and succeed on the second attempt."""
    limited = threading.Semaphore(2)

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        return (
            refusal(429, "slow down", **{"Retry-After": "2"})
            if limited.acquire(blocking=False)
            else prefers(len)(prompt, a, b)
        )

    with JudgeServer(answer) as server:
        assert wins(compare(judge_of(server, tmp_path), ["aa"], ["b"])) == [1.0]
        assert len(server.requests) == 4


def test_rate_limit_without_end(tmp_path: Path) -> None:
    with (
        JudgeServer(lambda *_: refusal(429, "quota exceeded")) as server,
        pytest.raises(
            RetryableError, match=r"answers 429 \(quota exceeded\) after 2 retries; .*judge.requests_per_minute"
        ),
    ):
        compare(judge_of(server, tmp_path), ["a"], ["b"])


def test_missing_key(tmp_path: Path) -> None:
    with (
        JudgeServer(prefers(len), key="secret") as server,
        pytest.raises(
            InputError, match=r"answers 401 .*; set the environment variable OPENAI_API_KEY to the API key"
        ) as error,
    ):
        compare(judge_of(server, tmp_path), ["a"], ["b"])
    assert not isinstance(error.value, RetryableError)


def test_wrong_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "wrong")
    with (
        JudgeServer(prefers(len), key="secret") as server,
        pytest.raises(InputError, match=r"answers 401 .*; correct the API key in OPENAI_API_KEY\."),
    ):
        compare(judge_of(server, tmp_path), ["a"], ["b"])
    assert len(server.requests) <= 2  # not retried


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (
            refusal(404, "The model does not exist"),
            r"answers 404 \(The model does not exist\); correct judge.url or judge.model",
        ),
        (refusal(301, "moved", Location="https://elsewhere/v1"), "answers 301 .*correct judge.url"),
        (
            refusal(400, "unsupported parameter"),
            r"rejects the request \(400: unsupported parameter\); correct the settings",
        ),
        (
            Reply(body=b"<html>welcome</html>"),
            r"does not answer like an OpenAI-compatible API \('<html>welcome</html>'\)",
        ),
        (Reply(body=b'{"choices": []}'), "does not answer like an OpenAI-compatible API"),
        (Reply(body=b"[1, 2]"), "does not answer like an OpenAI-compatible API"),
        (Reply(body=b'{"choices": [{"message": "text"}]}'), "does not answer like an OpenAI-compatible API"),
        (Reply(body=b""), "does not answer like an OpenAI-compatible API"),
        (Reply(status=418, body=b"\xff\xfe teapot"), "rejects the request"),
        (Reply(status=403, body=b"nginx"), r"answers 403 \(nginx\)"),
    ],
)
def test_rubbish_is_one_sentence(tmp_path: Path, reply: Reply, message: str) -> None:
    with JudgeServer(lambda *_: reply) as server, pytest.raises(InputError, match=message) as error:
        compare(judge_of(server, tmp_path), ["a"], ["b"])
    assert "\n" not in str(error.value)


def test_garbled_or_failing_replies_are_retried(tmp_path: Path) -> None:
    """Each question gets one bad reply first: another one each time, and then an answer."""
    bad = [
        Reply(body=b'{"error": {"code": 502}}'), Reply(body=b"garbled"), refusal(524, "a timeout"), refusal(500, "oops"),
        Reply(body=b'{"choices": []}'), refusal(429, "slow down"),
    ]  # fmt: skip
    seen: set[tuple[str, str]] = set()
    lock = threading.Lock()

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        with lock:
            if (prompt, a) in seen:
                return prefers(len)(prompt, a, b)
            seen.add((prompt, a))
            return bad[int(prompt.split()[1])]

    with JudgeServer(answer) as server:
        found = compare(judge_of(server, tmp_path), ["longer"] * 6, ["b"] * 6)
    assert wins(found) == [1.0] * 6
    assert (found.counts["requests"], found.counts["rejected"]) == (12, 0)


def test_one_question_that_always_fails_loses_one_pair(tmp_path: Path) -> None:
    log = Logs()

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        return refusal(500, "bad luck") if prompt == "question 3" and a == "b" else prefers(len)(prompt, a, b)

    with JudgeServer(answer) as server:
        found = compare(judge_of(server, tmp_path, log=log), ["longer"] * 8, ["b"] * 8)
    assert wins(found) == [1.0] * 3 + [None] + [1.0] * 4
    assert "1 requests have no answer; the first: " in "".join(log) and "bad luck" in "".join(log)


def test_slow_trickle_is_cut_off(tmp_path: Path) -> None:
    """A byte now and then does not keep a request alive."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def trickle() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            for _ in range(100):
                try:
                    connection.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.1)

        threading.Thread(target=trickle, daemon=True).start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with pytest.raises(RetryableError, match="did not answer within 0.5 seconds"):
            compare(judge_of(url, tmp_path, timeout_seconds=0.5, max_retries=0, max_concurrency=1), ["a"], ["b"])
    assert time.monotonic() - started < 4


def test_fatal_error_ends_the_retries_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 1.0)

    def answer(prompt: str, a: str, b: str) -> str | Reply:
        return (
            Reply(status=401, body=b"no", seconds=0.3)
            if prompt == "question 0"
            else refusal(429, "wait", **{"Retry-After": "100"})
        )

    started = time.monotonic()
    with JudgeServer(answer) as server, pytest.raises(InputError, match="answers 401"):
        compare(judge_of(server, tmp_path, max_retries=6), ["a"] * 5, ["b"] * 5)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("key", ["sk-abc\ndef-ghijkl", "sk-“quoted”-key"])
def test_key_with_impossible_characters_is_refused_without_quoting_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv(KEY, key)
    with pytest.raises(InputError, match=r"The API key in OPENAI_API_KEY contains characters that no key has") as error:
        judge_of("http://127.0.0.1:1/v1", tmp_path)
    assert "sk-" not in str(error.value)


def test_credentials_of_netrc_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with JudgeServer(prefers(len)) as server:
        compare(judge_of(server, tmp_path), ["a"], ["bc"])
        monkeypatch.setenv(KEY, "right")
        compare(judge_of(server, tmp_path, rubric="again"), ["a"], ["bc"])
    assert [headers.get("Authorization") for headers in server.headers] == [None, None, "Bearer right", "Bearer right"]


def test_unreadable_answers_are_asked_again_and_refusals_are_not(tmp_path: Path) -> None:
    replies: list[str | Reply] = ["what?", Reply(message={"role": "assistant", "content": None, "refusal": "no"})]
    with JudgeServer(lambda prompt, *_: replies[int(prompt.split()[1])]) as server:
        compare(judge_of(server, tmp_path), ["a", "b"], ["c", "d"])
        server.answer = lambda *_: "[[C]]"
        found = compare(judge_of(server, tmp_path), ["a", "b"], ["c", "d"])
    assert wins(found) == [0.5, None]
    assert (found.counts["requests"], found.counts["cached"]) == (2, 2)


def test_no_pairs_ask_nothing(tmp_path: Path) -> None:
    with JudgeServer(prefers(len)) as server:
        found = compare(judge_of(server, tmp_path), [], [])
        assert not server.requests
    assert found.wins.shape == (0,)


@pytest.mark.parametrize("strength", [0.5, 0.8])
def test_measured_win_rate_is_the_true_one(tmp_path: Path, strength: float) -> None:
    """The server prefers the first model's responses with a known probability; the measured rate is within 3 standard errors."""
    generator = torch.Generator().manual_seed(0)
    better = (torch.rand(300, generator=generator) < strength).tolist()

    def rank(response: str) -> float:
        number, model = response.split()
        return float(better[int(number)] == (model == "first"))

    answer: Callable[[str, str, str], str] = prefers(rank)
    with JudgeServer(answer) as server:
        found = compare(
            judge_of(server, tmp_path), [f"{i} first" for i in range(300)], [f"{i} second" for i in range(300)]
        )
    assert found.wins.mean().item() == pytest.approx(sum(better) / 300)
    assert abs(found.wins.mean().item() - strength) < 3 * math.sqrt(strength * (1 - strength) / 300)
