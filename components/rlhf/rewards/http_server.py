"""A reward server: batches of responses are posted as JSON, and a list of numbers comes back.

Request: {"query": [...], "prompts": [...], "responses": [...], "labels": [...], "columns": [{...}], "ids": [...]}, lists of one length.
query is prompt and response together. Answer: {"rewards": [...]}, and "ids" if the server echoes them, which must be those of the request
in their order. query, prompts, labels and rewards are those of OpenRLHF's remote reward models (openrlhf/utils/remote_rm_utils.py).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.rewards import HttpReward
from components.rlhf.data.records import Completion
from components.rlhf.rewards.owner import Owner, column_values
from components.rlhf.rewards.posting import Failure, Poster, Server, one_line
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.text.strict_json import NotJsonError, parse_json

LARGEST = 3.4e38  # of an fp32 number


class HttpScorer:
    """Scores by a server. Implements Scorer. A batch that stays without an answer is an error, because nothing can be made up for it."""

    def __init__(self, config: HttpReward, log: Callable[[str], None], owner: Owner) -> None:
        self.config, self.owner = config, owner
        self.server = Server(
            address=config.url,
            name=owner.title,
            prefix=f"The {owner.title}: ",
            key=owner.key,
            token_setting="token_variable",
            token_variable=config.token_variable,
            timeout_seconds=config.timeout_seconds,
            max_retries=config.max_retries,
            max_concurrency=config.max_concurrency,
            requests_per_minute=None,
            max_failures_in_a_row=1,
            has_models=False,
        )
        self.poster = Poster(self.server, self._read, log)

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises RetryableError if the server is down or answers with something else, and InputError if it refuses the request."""
        prompts = [completion.prompt for completion in completions]
        column, size = self.config.column, self.config.batch_size
        labels = column_values(self.owner, prompts, column) if column else [""] * len(prompts)
        starts = range(0, len(completions), size)
        bodies = {str(i): batch_body(completions[i : i + size], labels[i : i + size], first=i) for i in starts}
        results = self.poster.post_all(bodies)
        failure = next((result for result in results.values() if isinstance(result, Failure)), None)
        if failure:
            raise failure.error(self.server.prefix)
        scores: list[float] = []
        for i in starts:
            rewards = results[str(i)]
            assert not isinstance(rewards, Failure)
            scores += rewards
        return torch.tensor(scores, dtype=torch.float32)

    def close(self) -> None:
        """Close the connections."""
        self.poster.close()

    def _read(self, body: dict[str, Any], content: bytes) -> list[float] | Failure:
        problem = find_problem(body, content)
        if problem:
            return Failure(message=f"{self.config.url} {problem}; correct the server, or {self.owner.key}.url")
        return [float(reward) for reward in parse_json(content)["rewards"]]


def batch_body(completions: Sequence[Completion], labels: Sequence[str], *, first: int) -> dict[str, Any]:
    """The request for some completions, of which the first has this number in its call."""
    return {
        "query": [c.prompt.prompt + c.response for c in completions],
        "prompts": [c.prompt.prompt for c in completions],
        "responses": [c.response for c in completions],
        "labels": list(labels),
        "columns": [dict(c.prompt.columns) for c in completions],
        "ids": [first + i for i in range(len(completions))],
    }


def find_problem(body: dict[str, Any], content: bytes) -> str:
    """What is wrong with the answer to a request, as the rest of a sentence about the server; empty if nothing is."""
    try:
        answer = parse_json(content)
    except NotJsonError as error:
        return f"does not answer with JSON ({error}; it answers {one_line(content)[:80]!r})"
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        return f"answers without a list of rewards ({one_line(content)[:80]!r})"
    if len(rewards) != len(body["ids"]):
        return f"answers {len(rewards)} rewards for {len(body['ids'])} responses"
    for reward, response in zip(rewards, body["responses"], strict=True):
        is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if not is_number or not -LARGEST <= reward <= LARGEST:
            return f"answers {str(reward)[:80]!r} for the response {response[:80]!r}, which is no number"
    ids = answer.get("ids")
    if ids is not None and ids != body["ids"]:
        return "answers with other ids than those of the request, so its rewards may belong to other responses"
    return ""
