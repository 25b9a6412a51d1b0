from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import components.evaluation.judging as judging
from components.evaluation.compare import Comparison
from components.evaluation.judging import Judged, as_completion, judge_all
from components.evaluation.verdict import decide, summarize
from components.rlhf.config.evaluation import EvaluationConfig, GateConfig
from components.rlhf.config.judge import FunctionJudge, LinearJudge
from components.rlhf.config.storage import StorageConfig
from components.rlhf.data.records import Completion, Prompt, RatedText, ValidationSample
from components.rlhf.rewards.judges import (
    JudgeEntry,
    JudgeResources,
    OpenJudge,
    read_judges,
    read_judges_of,
    save_judges,
)
from components.rlhf.rewards.linear import fit_to_ratings, load_linear_judge
from components.rlhf.rewards.protocol import PairwiseJudge, Preferences, ScoreJudge, Scorer
from components.rlhf.text.errors import InputError
from tests.support.comparisons import CHANCE, GOOD, comparison_of, completion, entry_of

NAN = float("nan")


class LengthScorer:
    """Scores a response by its length in characters. Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def score(self, completions: Sequence[Completion], computed: object = None) -> Tensor:
        self.calls += 1
        return torch.tensor([float(len(c.response)) for c in completions])


class LongerWins:
    """A pairwise judge that prefers the longer response and answers the first of the pairs only."""

    def __init__(self, num_answered: int = 10**6, counts: dict[str, float] | None = None) -> None:
        self.num_answered, self.counts = num_answered, counts or {}

    def compare(self, first: Sequence[Completion], second: Sequence[Completion]) -> Preferences:
        wins = torch.tensor([float(len(a.response) > len(b.response)) for a, b in zip(first, second, strict=True)])
        wins[self.num_answered :] = NAN
        consistent = torch.arange(len(wins)) % 2 == 0
        return Preferences(wins=wins, consistent=consistent, counts=self.counts)


class Broken:
    """A judge that cannot be asked, whatever is asked of it."""

    def score(self, completions: Sequence[Completion], computed: object = None) -> Tensor:
        raise InputError("The server is down; start it.")

    def compare(self, first: Sequence[Completion], second: Sequence[Completion]) -> Preferences:
        raise InputError("The server is down; start it.")


def rows_of(sft: list[str], ppo: list[str]) -> Comparison:
    """A comparison of these responses. Those that are cut are their first two characters."""
    c = comparison_of([0.0] * len(sft), [0.0] * len(sft))

    def with_texts(responses: Any, texts: list[str]) -> Any:
        whole = [replace(x, response=text) for x, text in zip(responses.completions, texts, strict=True)]
        return replace(responses, completions=whole, cut=[replace(x, response=x.response[:2]) for x in whole])

    return replace(c, sft=with_texts(c.sft, sft), policy=with_texts(c.policy, ppo))


def samples_of(*responses: str) -> list[ValidationSample]:
    return [
        ValidationSample(
            iteration=i,
            num_rollouts=i,
            prompt=Prompt(prompt="It", id=f"validation-{i}"),
            prompt_ids=[5],
            response_ids=[7, 8],
            response=text,
            truncated=i == 0,
            score=0.0,
            kl=0.0,
        )
        for i, text in enumerate(responses)
    ]


def resources_of(log: list[str]) -> JudgeResources:
    return JudgeResources(precision="fp32", storage=StorageConfig(), log=log.append)


def judge(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    judges: dict[str, tuple[JudgeEntry, Scorer | PairwiseJudge]],
    comparison: Comparison,
    validation: Sequence[ValidationSample] = (),
) -> tuple[list[Judged], list[str]]:
    """What these judges say, and the log. Entries are read from a file, and what judges compute with is replaced."""
    save_judges(folder, [entry for entry, _ in judges.values()])

    def open_judge(entry: JudgeEntry, directory: Path, resources: JudgeResources) -> OpenJudge:
        made = judges[entry.settings.title][1]
        assert directory == folder
        scorer: Any = made if hasattr(made, "score") else None
        pairwise: Any = made if scorer is None else ScoreJudge(scorer)
        return OpenJudge(entry=entry, pairwise=pairwise, scorer=scorer)

    monkeypatch.setattr(judging, "open_judge", open_judge)
    log: list[str] = []
    return judge_all(read_judges(folder), folder, comparison, validation, resources_of(log)), log


def verdict_of(comparison: Comparison, judges: list[Judged]) -> tuple[dict[str, float], str, str]:
    config = EvaluationConfig(num_bootstrap=100)
    numbers = summarize(comparison, judges, config, reward_accuracy=None, seed=0)
    verdict = decide(numbers, judges[0], GateConfig())
    return numbers, verdict.decision, verdict.reason


LONGER = rows_of(["it"] * 40, ["it was"] * 40)  # PPO's responses are longer


def test_scorer_scores_everything_in_one_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = rows_of(["", "it was", "x", "aa"], ["it", "it", "y", "bbbb"])
    scorer = LengthScorer()
    (judged,), log = judge(
        tmp_path, monkeypatch, {"a": (entry_of("a"), scorer)}, comparison, samples_of("so", "so it is", "")
    )
    assert judged.sft_scores == [0, 6, 1, 2]
    assert judged.policy_scores == [2, 2, 1, 4]
    assert judged.wins.tolist() == [1, 0, 0.5, 1]
    assert judged.cut_wins is not None
    assert judged.cut_wins.tolist() == [1, 0.5, 0.5, 0.5]  # "" and "it", then "it" and "it", x and y, aa and bb
    assert judged.validation_scores == [2, 8, 0]
    assert judged.consistent == [True] * 4
    assert (judged.name, judged.is_pairwise, judged.error, judged.cannot_tell, judged.counts) == (
        "a",
        False,
        "",
        "",
        {},
    )
    assert scorer.calls == 1
    assert log == ["judge a compared 4 pairs"]


def test_scorer_without_validation_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (judged,), _ = judge(tmp_path, monkeypatch, {"a": (entry_of("a"), LengthScorer())}, LONGER)
    assert judged.validation_scores == []
    assert judged.wins.tolist() == [1.0] * 40


def test_pairwise_judge_gives_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first response is PPO's: a win is one of PPO."""
    comparison = rows_of(["", "it was", "x"], ["it", "it", "y"])
    judges = {"a": (entry_of("a"), LongerWins(2, {"requests": 4.0}))}
    (judged,), _ = judge(tmp_path, monkeypatch, judges, comparison, samples_of("so"))
    assert judged.wins[:2].tolist() == [1.0, 0.0]
    assert np.isnan(judged.wins[2])
    assert judged.consistent == [True, False, True]
    assert judged.counts == {"requests": 4.0}
    assert judged.is_pairwise
    assert (judged.sft_scores, judged.policy_scores, judged.cut_wins, judged.validation_scores) == (None,) * 4


def test_validation_sample_as_completion() -> None:
    sample = samples_of("so")[0]
    expected = completion(Prompt(prompt="It", id="validation-0"), "so", truncated=True)
    assert as_completion(sample) == replace(expected, prompt_ids=[5], response_ids=[7, 8])


CANNOT_TELL = {
    "scorer that raises": (GOOD, Broken(), "The server is down; start it"),
    "at chance": (
        CHANCE,
        LengthScorer(),
        "its agreement with people, 52.0% [45.0%, 59.0%] on 200 held-out human pairs, is not above chance",
    ),
    "not measured": (None, LengthScorer(), "it answered none of the held-out human pairs"),
    "few answers": (
        GOOD,
        LongerWins(32, {"refused": 3.0, "unreadable": 13.0, "rejected": 0.0}),
        "it answered only 80% of the comparisons (3 refused, 13 unreadable)",
    ),
}


@pytest.mark.parametrize(("agreement", "made", "reason"), CANNOT_TELL.values(), ids=CANNOT_TELL)
def test_judge_that_cannot_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agreement: Any, made: Any, reason: str
) -> None:
    judges, log = judge(tmp_path, monkeypatch, {"mine": (entry_of("mine", agreement), made)}, LONGER, samples_of("so"))
    assert [j.cannot_tell for j in judges] == [reason]
    assert log == [f"judge mine cannot tell, because {reason}"]
    numbers, decision, why = verdict_of(LONGER, judges)
    assert not [name for name in numbers if name.startswith("win_rate")]
    assert (decision, why) == ("reject", f"no verdict: the judge mine cannot tell, because {reason}")


@pytest.mark.parametrize(("agreement", "made", "reason"), CANNOT_TELL.values(), ids=CANNOT_TELL)
def test_second_judge_that_cannot_tell_does_not_disturb_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agreement: Any, made: Any, reason: str
) -> None:
    first, second = (entry_of("first"), LengthScorer()), (entry_of("second", agreement), made)
    (alone,), _ = judge(tmp_path, monkeypatch, {"first": first}, LONGER, samples_of("so"))
    judges, log = judge(tmp_path, monkeypatch, {"first": first, "second": second}, LONGER, samples_of("so"))
    assert log == ["judge first compared 40 pairs", f"judge second cannot tell, because {reason}"]
    assert judges[0].wins.tolist() == alone.wins.tolist()
    assert judges[0].validation_scores == alone.validation_scores == [2.0]
    assert judges[1].cannot_tell == reason
    numbers, decision, why = verdict_of(LONGER, judges)
    expected, *verdict = verdict_of(LONGER, [alone])
    assert {name: numbers[name] for name in expected} == expected
    assert [decision, why] == verdict
    assert decision == "promote"
    assert "judges/second/win_rate" not in numbers
    assert numbers["judges/second/num_unanswered"] == {"scorer that raises": 40, "few answers": 8}.get(
        next(name for name, case in CANNOT_TELL.items() if case[2] == reason), 0
    )


def test_judge_that_could_not_be_asked_has_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (judged,), _ = judge(tmp_path, monkeypatch, {"a": (entry_of("a"), Broken())}, LONGER, samples_of("so"))
    assert np.isnan(judged.wins).all()
    assert len(judged.wins) == len(judged.consistent) == 40
    assert not judged.is_pairwise
    assert (judged.sft_scores, judged.policy_scores, judged.cut_wins, judged.validation_scores) == (None,) * 4


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = LengthScorer()
    monkeypatch.setattr(scorer, "score", lambda completions: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        judge(tmp_path, monkeypatch, {"a": (entry_of("a"), scorer)}, LONGER)


def test_several_judges_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = rows_of(["it was", "it"] * 20, ["it", "it was"] * 20)
    judges = {
        "b": (entry_of("b"), LongerWins()),
        "a": (entry_of("a"), LengthScorer()),
        "c": (entry_of("c"), LongerWins(0)),
    }
    found, _ = judge(tmp_path, monkeypatch, judges, comparison)
    assert [j.name for j in found] == ["b", "a", "c"]
    numbers, decision, why = verdict_of(comparison, found)
    assert [numbers["win_rate"], numbers["judges/a/win_rate"]] == [0.5, 0.5]
    assert numbers["kappa/b/a"] == pytest.approx(1.0)
    assert "kappa/b/c" not in numbers
    assert "judges/c/win_rate" not in numbers
    assert decision == "reject"
    assert why.startswith("win rate 0.500")


# Judges of an artifact, without replaced parts.


def linear_judge(folder: Path, name: str) -> JudgeEntry:
    rated = [RatedText(prompt="", completion=text, rating=len(text)) for text in ("it is so", "we", "a film that was")]
    settings = LinearJudge(name=name, features="words", max_ngram=1)
    (folder / name).mkdir()
    fit_to_ratings(rated, settings).save(folder / name)
    return JudgeEntry(settings=settings, agreement=GOOD)


def test_linear_judge_of_an_artifact(tmp_path: Path) -> None:
    save_judges(tmp_path, [linear_judge(tmp_path, "words")])
    comparison = rows_of(["it is", "we", "so"], ["a film", "we", "it"])
    log: list[str] = []
    (judged,) = judge_all(read_judges(tmp_path), tmp_path, comparison, samples_of("so", "we"), resources_of(log))
    scorer = load_linear_judge(tmp_path / "words")
    assert judged.sft_scores == scorer.score(comparison.sft.completions).tolist()
    assert judged.policy_scores == scorer.score(comparison.policy.completions).tolist()
    assert judged.validation_scores == scorer.score_texts(["Itso", "Itwe"]).tolist()
    assert judged.wins[1] == 0.5
    assert judged.entry.agreement == GOOD
    assert judged.cannot_tell == ""
    assert log == ["judge words compared 3 pairs"]


def test_judges_that_cannot_be_loaded_or_called_are_no_error(tmp_path: Path) -> None:
    """A linear judge without its files, and a function that raises."""
    source = "def score(prompts, responses):\n    raise ValueError('no scores today')\n"
    function = JudgeEntry(settings=FunctionJudge(kind="function", function="mine:score", source=source), agreement=GOOD)
    good = linear_judge(tmp_path, "words")
    save_judges(tmp_path, [good, entry_of("missing"), function])
    found = judge_all(read_judges(tmp_path), tmp_path, LONGER, [], resources_of([]))
    assert [bool(j.cannot_tell) for j in found] == [False, True, True]
    assert found[1].cannot_tell.startswith(f"{tmp_path}/missing is not a loadable judge")
    assert found[2].cannot_tell == (
        "The judge's function mine:score raised ValueError: no scores today; correct the function"
    )


def test_judges_of_an_artifact_are_those_of_the_settings(tmp_path: Path) -> None:
    """Else code and addresses could come from a file that another run has written."""
    with pytest.raises(InputError, match="run the judge stage again"):
        read_judges_of([LinearJudge()], tmp_path)
    save_judges(tmp_path, [entry_of("a"), entry_of("b", CHANCE)])
    a, b = LinearJudge(name="a"), LinearJudge(name="b")
    assert read_judges_of([a, b], tmp_path) == [entry_of("a"), entry_of("b", CHANCE)]
    for others in ([b, a], [a], [a, b, LinearJudge()], [a, LinearJudge(name="b", max_ngram=3)]):
        with pytest.raises(InputError, match="has other judges than the settings of this run"):
            read_judges_of(others, tmp_path)
