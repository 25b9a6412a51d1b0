"""A judge behind an OpenAI-compatible API: it reads a prompt and two responses, in both orders, and names the better one."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.answers import Answer, AnswerCache
from components.rlhf.rewards.chat_api import COUNTS, ChatApi, prompt_text
from components.rlhf.rewards.owner import JUDGE
from components.rlhf.rewards.protocol import Preferences

# How the two responses are shown and what the answer must look like follows the pairwise prompt of MT-Bench (Zheng et al. 2023).
INSTRUCTION = "Which response is better? You may think first, but end your answer with exactly one of [[A]], [[B]], or [[C]] for a tie."
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]\W*$", re.IGNORECASE)
BARE_VERDICT = re.compile(r"\W*(?:(?:response|answer)\W+)?(A|B|C|tie)\W*", re.IGNORECASE)
FIRST_WINS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}


class EndpointJudge:
    """Asks the endpoint about every pair in both orders. Implements PairwiseJudge.

    A pair's win is the mean over the two orders, so that a judge that prefers a position gives ties. A pair without an answer in
    one of the orders has none (nan). Equal responses are ties, and the endpoint is not asked.
    """

    def __init__(self, config: EndpointConfig, answers: AnswerCache, log: Callable[[str], None]) -> None:
        self.api = ChatApi(config, answers, log, JUDGE)
        self.rubric = config.rubric or (Path(__file__).parent / "rubric.txt").read_text(encoding="utf-8")

    def compare(self, first: Sequence[Completion], second: Sequence[Completion]) -> Preferences:
        """Raises RetryableError if the endpoint is down, and InputError if it refuses the key, the model or every request."""
        pairs = list(zip(first, second, strict=True))
        asked = [i for i, (a, b) in enumerate(pairs) if a.response != b.response]
        bodies = {
            (i, swapped): self._body(pairs[i][0].prompt, *[c.response for c in pairs[i][:: -1 if swapped else 1]])
            for i in asked
            for swapped in (False, True)
        }
        counts: Counter[str] = Counter()
        wins, consistent = torch.full((len(pairs),), 0.5), torch.ones(len(pairs), dtype=torch.bool)
        # 1 if the answer prefers A, 0 if B, 0.5 for a tie, None without a verdict.
        found = self.api.ask(list(bodies.values()), read_verdict, counts)
        verdicts = {key: found[i] for i, key in enumerate(bodies)}
        for i in asked:
            straight, swapped = verdicts[i, False], verdicts[i, True]
            if straight is None or swapped is None:
                wins[i], consistent[i] = torch.nan, False
            else:
                wins[i], consistent[i] = (straight + 1 - swapped) / 2, straight == 1 - swapped
        return Preferences(
            wins=wins,
            consistent=consistent,
            counts={name: float(counts[name]) for name in COUNTS} | {"cost": self.api.cost(counts)},
        )

    def _body(self, prompt: Prompt, a: str, b: str) -> dict[str, Any]:
        question = f"[Prompt]\n{prompt_text(prompt)}\n\n[Response A]\n{a}\n[End of response A]\n\n[Response B]\n{b}\n[End of response B]"
        return self.api.body(self.rubric, f"{question}\n\n{INSTRUCTION}")


def read_verdict(answer: Answer) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie: the [[...]] at the end, or an answer that is nothing but the letter. None for anything else."""
    if answer.refused or answer.finish_reason == "length":
        return None
    found = VERDICT.search(answer.content) or BARE_VERDICT.fullmatch(answer.content)
    return FIRST_WINS[found[1].lower()] if found else None
