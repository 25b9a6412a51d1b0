"""The reward that a language model gives by a rubric."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.rlhf.config.rewards import EndpointReward
from components.rlhf.config.storage import StorageConfig
from components.rlhf.rewards import posting
from components.rlhf.rewards.answers import Answer, open_answers
from components.rlhf.rewards.grades import GradeScorer, read_grade
from components.rlhf.rewards.owner import Owner
from components.rlhf.text.errors import InputError, RetryableError
from tests.support.judge_server import Reply, refusal
from tests.support.reward_server import Logs, RewardServer, chat, completions

OWNER = Owner(title="reward gpt", key="ppo.rewards.2")


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posting, "SECONDS", 0.01)


def scorer_of(server: RewardServer, folder: Path, log: Logs | None = None, **config: Any) -> GradeScorer:
    log = Logs() if log is None else log
    url = server.url.removesuffix("/get_reward")
    settings = EndpointReward(kind="endpoint", url=url, model="m", **{"max_retries": 1, **config})
    return GradeScorer(settings, open_answers(StorageConfig(answers_uri=str(folder)), "m", log), log, OWNER)


def graded(**grades: str) -> Any:
    """Answers by the response."""

    def answer(body: dict[str, Any]) -> Any:
        question = body["messages"][1]["content"]
        response = question.partition("[Response]\n")[2].partition("\n[End of response]")[0]
        return chat(grades[response])

    return answer


def test_grades_are_divided_by_ten(tmp_path: Path) -> None:
    with RewardServer(graded(a="It is fine. [[7.5]]", b="10", c="[[0]]")) as server:
        scorer = scorer_of(server, tmp_path, rubric="Be strict.", input_price=1.0, output_price=2.0)
        assert scorer.score(completions("a", "b", "c")).tolist() == [0.75, 1.0, 0.0]
        assert scorer.counts["requests"] == 3 and scorer.counts["failed"] == 0
        assert scorer.counts["cost"] == pytest.approx((300 * 1.0 + 30 * 2.0) / 1e6)
        # The same response again costs nothing, in this run and in the next one.
        scorer.score(completions("a"))
        scorer.close()
        assert scorer_of(server, tmp_path, rubric="Be strict.").score(completions("a", "b")).tolist() == [0.75, 1.0]
    assert len(server.requests) == 3
    body = server.requests[0]
    assert body["model"] == "m" and body["temperature"] == 0
    assert body["messages"][0] == {"role": "system", "content": "Be strict."}
    assert "[Prompt]\nprompt " in body["messages"][1]["content"]


@pytest.mark.parametrize(
    ("content", "grade"),
    [
        ("[[7]]", 7), ("[[ 7.5 ]]", 7.5), ("[[10]].", 10), ("[[8/10]]", 8), ("First [[3]], no, [[4]]", 4), ("**[[6]]**", 6),
        ("7", 7), (" 7.25\n", 7.25), ("Score: 9", 9), ("grade 9/10.", 9), ("**8**", 8), ("0", 0), ("10/10", 10), ("Rating: 5 / 10", 5),
        ("[[11]]", None), ("11", None), ("-5", None), ("[[-5]]", None), (".5", None), ("[[7]] or so", None), ("7 of 10", None),
        ("7/100", None), ("seven", None), ("", None), ("I would say 7", None), ("7 8", None), ("[[A]]", None), ("[[nan]]", None),
        ("1e1", None), ("5%", None),
    ],
)  # fmt: skip
def test_read_grade(content: str, grade: float | None) -> None:
    assert read_grade(Answer(content=content)) == grade


def test_cut_or_refused_answer_has_no_grade() -> None:
    assert read_grade(Answer(content="[[7]]", finish_reason="length")) is None
    assert read_grade(Answer(content="[[7]]", refused=True)) is None


@given(st.text(max_size=30))
def test_any_text_is_a_grade_or_none(content: str) -> None:
    grade = read_grade(Answer(content=content))
    assert grade is None or 0 <= grade <= 10


def test_responses_without_a_grade_get_the_mean_of_the_others(tmp_path: Path) -> None:
    log = Logs()
    with RewardServer(graded(a="[[2]]", b="[[9]]", c="who knows", d="I cannot help with that.", e="[[4]]")) as server:
        scorer = scorer_of(server, tmp_path, log)
        scores = scorer.score(completions("a", "b", "c", "d", "e"))
    assert scores.tolist() == pytest.approx([0.2, 0.9, 0.5, 0.5, 0.4])
    assert scorer.counts["failed"] == 2 and scorer.counts["unreadable"] == 2
    assert "2 of 5 responses got no grade from m (0 refused, 2 unreadable, 0 rejected)" in log[-1]


def test_too_many_without_a_grade_are_one_sentence(tmp_path: Path) -> None:
    with (
        RewardServer(graded(a="[[2]]", b="?", c="?", d="?")) as server,
        pytest.raises(
            InputError,
            match=r"^The reward gpt is of no use: 3 of 4 responses got no grade from m .*ppo.rewards.2.rubric",
        ),
    ):
        scorer_of(server, tmp_path).score(completions("a", "b", "c", "d"))
    with (
        RewardServer(graded(a="?", b="?")) as server,
        pytest.raises(InputError, match="no grade from m for any response"),
    ):
        scorer_of(server, tmp_path / "other").score(completions("a", "b"))


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (Reply(status=500), RetryableError, "after 1 retries"),
        (refusal(401, "bad key"), InputError, "set ppo.rewards.2.api_key_variable"),
        (refusal(404, "no such model"), InputError, "correct ppo.rewards.2.url or ppo.rewards.2.model"),
        (refusal(400, "context length"), InputError, "rejects the request"),
        (Reply(body=b"[]"), RetryableError, "does not answer like an OpenAI-compatible API"),
    ],
)
def test_failures_name_the_reward(tmp_path: Path, reply: Reply, kind: type[InputError], message: str) -> None:
    with RewardServer(lambda body: reply) as server, pytest.raises(kind) as error:
        scorer_of(server, tmp_path).score(completions("a", "b"))
    assert str(error.value).startswith("The reward gpt: ") and message in str(error.value)


def test_equal_responses_are_asked_once_and_no_responses_never(tmp_path: Path) -> None:
    with RewardServer(graded(a="[[2]]")) as server:
        scorer = scorer_of(server, tmp_path)
        assert scorer.score([]).shape == (0,)
        assert scorer.score(completions("a") * 3).tolist() == pytest.approx([0.2] * 3)
    assert len(server.requests) == 1
