"""A generative reward: a model behind an OpenAI-compatible API grades each response from 0 to 10 by a rubric."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from components.rlhf.config.scoring import Endpoint
from components.rlhf.data.records import Completion
from components.rlhf.rewards.answers import Answer, AnswerCache
from components.rlhf.rewards.chat_api import COUNTS, ChatApi, prompt_text
from components.rlhf.rewards.owner import Owner, require_few_failures
from components.rlhf.rewards.protocol import ComputedStates

INSTRUCTION = "How good is the response? You may think first, but end your answer with a number from 0 to 10 in the form [[7]] or [[7.5]]."
BEST = 10.0
NUMBER = r"(\d{1,2}(?:\.\d{1,6})?)"
GRADE = re.compile(rf"\[\[\s*{NUMBER}\s*(?:/\s*10\s*)?\]\]\W*$")
BARE_GRADE = re.compile(rf"\W*(?:(?:score|grade|rating)\W+)?(?<![-.]){NUMBER}\s*(?:/\s*10)?[\s.*]*", re.IGNORECASE)


class GradeScorer:
    """Grades divided by 10. Implements Scorer, but for responses without a grade.

    A refusal, an answer that is no grade and a rejected request say nothing about the response: it gets the mean grade of the others of
    the call, which rewards and penalizes nothing. Too many of them are an error. counts collects what the answers took.
    """

    def __init__(self, config: Endpoint, answers: AnswerCache, log: Callable[[str], None], owner: Owner) -> None:
        self.api, self.owner, self.log = ChatApi(config, answers, log, owner), owner, log
        self.rubric = config.rubric or (Path(__file__).parent / "grade_rubric.txt").read_text(encoding="utf-8")
        self.counts: Counter[str] = Counter(dict.fromkeys((*COUNTS, "failed", "cost"), 0))

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises RetryableError if the endpoint is down, and InputError if it refuses the key, the model, or grades too few."""
        counts: Counter[str] = Counter()
        grades = self.grades(completions, counts)
        given = [grade for grade in grades if grade is not None]
        self.counts.update(counts)
        self.counts["failed"] += len(grades) - len(given)
        self.counts["cost"] += self.api.cost(counts)  # type: ignore[assignment]
        mean = sum(given) / max(len(given), 1)
        return torch.tensor([mean if grade is None else grade for grade in grades], dtype=torch.float32) / BEST

    def grades(self, completions: Sequence[Completion], counts: Counter[str]) -> list[float | None]:
        """The grade of each response, from 0 to 10; None without one. counts what the answers took. Raises as score."""
        grades = self.api.ask([self._body(completion) for completion in completions], read_grade, counts)
        failed = [c for c, grade in zip(completions, grades, strict=True) if grade is None]
        refused = f"{counts['refused']} refused, {counts['unreadable']} unreadable, {counts['rejected']} rejected"
        require_few_failures(
            self.owner,
            failed,
            len(completions),
            f"got no grade from {self.api.config.model} ({refused})",
            f"correct {self.owner.key}.rubric or raise {self.owner.key}.max_tokens",
            self.log,
        )
        if failed and len(failed) == len(completions):
            raise self.owner.error(
                f"got no grade from {self.api.config.model} for any response ({refused}); correct {self.owner.key}"
            )
        return grades

    def close(self) -> None:
        """Write the answers that have not been written yet, and close the connections."""
        self.api.answers.flush()
        self.api.poster.close()

    def _body(self, completion: Completion) -> dict[str, object]:
        question = f"[Prompt]\n{prompt_text(completion.prompt)}\n\n[Response]\n{completion.response}\n[End of response]"
        return self.api.body(self.rubric, f"{question}\n\n{INSTRUCTION}")


def read_grade(answer: Answer) -> float | None:
    """The number from 0 to 10 in the [[...]] at the end, or in an answer that is nothing but the number. None for anything else."""
    if answer.refused or answer.finish_reason == "length":
        return None
    found = GRADE.search(answer.content) or BARE_GRADE.fullmatch(answer.content)
    grade = float(found[1]) if found else None
    return grade if grade is not None and grade <= BEST else None
