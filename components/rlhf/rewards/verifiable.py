"""Rewards that are computed from the response and the data alone: exact match, regular expression, value, JSON schema.

Of a response of several turns they read the answer, which is the model's last turn.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.scoring import ExactMatch, JsonSchema, Numeric, Regex
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.check_pool import SECONDS, CheckPool
from components.rlhf.rewards.checks import equal_text
from components.rlhf.rewards.owner import Owner, column_values, max_failed, named, require_few_failures
from components.rlhf.rewards.protocol import ComputedStates


class ExactMatchScorer:
    """1 if the response is the text of a column, else 0. Implements Scorer."""

    def __init__(self, config: ExactMatch, owner: Owner) -> None:
        self.config, self.owner = config, owner

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError for a prompt without an answer."""
        config = self.config
        answers = column_values(self.owner, [c.prompt for c in completions], config.column)
        scores = [
            float(equal_text(c.answer, answer, after=config.after, ignore_case=config.ignore_case))
            for c, answer in zip(completions, answers, strict=True)
        ]
        return torch.tensor(scores, dtype=torch.float32)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises InputError for a prompt without an answer."""
        column_values(self.owner, prompts, self.config.column)


class CheckScorer:
    """1 if the response passes a check, else 0; the checks run in processes of their own. Implements Scorer.

    A check that takes longer than 5 seconds counts as not passed, up to a quarter of the responses. counts["failed"] is their number.
    """

    def __init__(
        self, config: Regex | Numeric | JsonSchema, owner: Owner, pool: CheckPool, log: Callable[[str], None]
    ) -> None:
        self.config, self.owner, self.pool, self.log = config, owner, pool, log
        self.counts: Counter[str] = Counter(failed=0)

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError for a prompt without an answer or with one that is none, and if too many checks take too long."""
        if not completions:
            return torch.zeros(0)
        prompts = [completion.prompt for completion in completions]
        results = self._check(prompts, [completion.answer for completion in completions])
        failed = [completion for completion, result in zip(completions, results, strict=True) if not result]
        self.counts["failed"] += len(failed)
        require_few_failures(
            self.owner,
            failed,
            len(completions),
            f"could not be checked within {SECONDS:g} seconds and 4 GiB of memory",
            f"simplify {self.owner.key}" + (".pattern" if isinstance(self.config, Regex) else ""),
            self.log,
        )
        return torch.tensor([float(result.get("value", False)) for result in results], dtype=torch.float32)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises InputError for a prompt without an answer, and for one of the first 1,000 with an answer that is none."""
        if isinstance(self.config, Numeric) or self.config.column:
            column_values(self.owner, prompts, self.config.column or "")
        if prompts and not isinstance(self.config, Regex):
            self._check(prompts[:1000], ["{}"] * len(prompts[:1000]))

    def _check(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[dict[str, Any]]:
        column = self.config.column
        answers = column_values(self.owner, prompts, column) if column else [""] * len(prompts)
        requests = [self._request(response, answer) for response, answer in zip(responses, answers, strict=True)]
        results = self.pool.check_all(requests, max_failed=max_failed(len(requests)))
        for prompt, answer, result in zip(prompts, answers, results, strict=True):
            if "error" in result:
                what = f"the column {column} of prompt {named(prompt)}, {answer[:80]!r}," if column else "schema_text"
                raise self.owner.error(f"cannot be computed: {what} {result['error']}; correct the data")
        return results

    def _request(self, response: str, answer: str) -> dict[str, Any]:
        config = self.config
        request: dict[str, Any] = {"kind": config.kind, "response": response}
        if isinstance(config, Regex):
            return request | {"pattern": config.pattern, "answer": answer if config.column else None}
        if isinstance(config, JsonSchema):
            return request | {"schema": answer if config.column else config.schema_text}
        return request | {"answer": answer}
