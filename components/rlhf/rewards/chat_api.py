"""An OpenAI-compatible API, with the answers that have been paid for: what the endpoint judge and the endpoint reward ask with."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from components.rlhf.config.scoring import Endpoint
from components.rlhf.data.records import Prompt
from components.rlhf.rewards.answers import Answer, AnswerCache, request_digest
from components.rlhf.rewards.owner import Owner
from components.rlhf.rewards.posting import Failure, Poster, Server, one_line

MAX_FAILURES_IN_A_ROW = 3
COUNTS = ("requests", "cached", "refused", "unreadable", "rejected", "input_tokens", "output_tokens")


class ChatApi:
    """Asks questions of one model. counts collects what the answers took, under the names of COUNTS."""

    def __init__(self, config: Endpoint, answers: AnswerCache, log: Callable[[str], None], owner: Owner) -> None:
        self.config, self.answers, self.log = config, answers, log
        self.address, self.key = f"{config.url}/chat/completions", owner.key
        server = Server(
            address=self.address,
            name=config.model,
            prefix="" if owner.key == "judge" else f"The {owner.title}: ",
            key=owner.key,
            token_setting="api_key_variable",
            token_variable=config.api_key_variable,
            timeout_seconds=config.timeout_seconds,
            max_retries=config.max_retries,
            max_concurrency=config.max_concurrency,
            requests_per_minute=config.requests_per_minute,
            max_failures_in_a_row=MAX_FAILURES_IN_A_ROW,
            has_models=True,
        )
        self.poster = Poster(server, self._read, log)

    def body(self, system: str, user: str) -> dict[str, Any]:
        """A request with the rubric as the system message; extra_body overrides, and null removes a field."""
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [{"role": "system", "content": system.strip()}, {"role": "user", "content": user}],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            **self.config.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def ask(
        self, bodies: Sequence[dict[str, Any]], parse: Callable[[Answer], float | None], counts: Counter[str]
    ) -> list[float | None]:
        """parse(answer) of each request, None for one without an answer. Equal requests are sent once.

        An answer that parse cannot read is not reused from the cache, unless it is a refusal: what made it unreadable may be mended.
        Raises RetryableError if the endpoint is down, and InputError if it refuses the key, the model or every request.
        """
        keys = [request_digest(self.address, body) for body in bodies]
        known = {key: answer for key in keys if (answer := self.answers.get(key))}
        answers = {key: answer for key, answer in known.items() if answer.refused or parse(answer) is not None}
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in answers}
        counts["cached"] += len(answers)
        if missing:
            answers |= self._ask_missing(missing, num_known=len(answers), counts=counts)
        parsed = {key: parse(answer) for key, answer in answers.items()}
        for key, answer in answers.items():
            if parsed[key] is None:
                counts["refused" if answer.refused else "unreadable"] += 1
        return [parsed.get(key) for key in keys]

    def cost(self, counts: Counter[str]) -> float:
        """What the tokens cost, in the currency of the prices."""
        config = self.config
        return (counts["input_tokens"] * config.input_price + counts["output_tokens"] * config.output_price) / 1e6

    def _ask_missing(self, bodies: dict[str, Any], *, num_known: int, counts: Counter[str]) -> dict[str, Answer]:
        self.log(f"asking {self.config.model} {len(bodies):,} questions; {num_known:,} are answered in the cache")
        try:
            results = self.poster.post_all(bodies, self.answers.put)
        finally:
            self.answers.flush()
        failures = [result for result in results.values() if isinstance(result, Failure)]
        answers = {key: result for key, result in results.items() if isinstance(result, Answer)}
        if failures and not answers and not num_known:
            raise failures[0].error(self.poster.server.prefix)
        if failures:
            self.log(f"{len(failures)} requests have no answer; the first: {failures[0].message}")
        counts["rejected"] += len(failures)
        counts["requests"] += len(answers)
        for answer in answers.values():
            counts["input_tokens"] += answer.input_tokens
            counts["output_tokens"] += answer.output_tokens
        return answers

    def _read(self, body: Any, content: bytes) -> Answer | Failure:
        what = f"{self.address} does not answer like an OpenAI-compatible API ({one_line(content)[:80]!r})"
        return parse_answer(content) or Failure(message=f"{what}; correct {self.key}.url")


def parse_answer(content: bytes) -> Answer | None:
    """The answer in a chat completion; None if it is not one."""
    try:
        completion = json.loads(content)
        choice, usage = completion["choices"][0], completion.get("usage") or {}
        message, reason = choice["message"], str(choice.get("finish_reason") or "")
        text, refusal = message.get("content") or "", message.get("refusal")
        return Answer(
            content=str(text),
            finish_reason=reason,
            refused=bool(refusal) or reason == "content_filter",
            input_tokens=max(int(usage.get("prompt_tokens") or 0), 0),
            output_tokens=max(int(usage.get("completion_tokens") or 0), 0),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the messages of a conversation with their roles, or the plain text."""
    if prompt.conversation is None:
        return prompt.prompt
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt.conversation.messages)
