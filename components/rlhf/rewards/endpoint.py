"""A judge behind an OpenAI-compatible API: it reads a prompt and two responses, in both orders, and names the better one."""

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError
from urllib3.util import Retry

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.answers import Answer, AnswerCache, request_digest
from components.rlhf.rewards.protocol import Preferences
from components.rlhf.text.errors import InputError, RetryableError

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
MAX_WAIT_SECONDS, MAX_RETRY_AFTER_SECONDS, LOG_SECONDS = 60, 120, 15.0
# How the two responses are shown and what the answer must look like follows the pairwise prompt of MT-Bench (Zheng et al. 2023).
INSTRUCTION = "Which response is better? You may think first, but end your answer with exactly one of [[A]], [[B]], or [[C]] for a tie."
VERDICT = re.compile(r"\[\[\s*(A|B|C|tie)\s*\]\]", re.IGNORECASE)
BARE_VERDICT = re.compile(r"\W*(?:(?:response|answer)\W+)?(A|B|C|tie)\W*", re.IGNORECASE)
FIRST_WINS = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
Messages = list[dict[str, str]]


class EndpointJudge:
    """Asks the endpoint about every pair in both orders. Implements PairwiseJudge.

    A pair's win is the mean over the two orders, so that a judge that prefers a position gives ties. A pair without an answer in
    one of the orders has none (nan). Equal responses are ties, and the endpoint is not asked.
    """

    def __init__(self, config: EndpointConfig, answers: AnswerCache, log: Callable[[str], None]) -> None:
        self.config, self.answers, self.log = config, answers, log
        self.address = f"{config.url}/chat/completions"
        self.rubric = config.rubric or (Path(__file__).parent / "rubric.txt").read_text(encoding="utf-8")
        key = os.environ.get(config.api_key_variable) if config.api_key_variable else None
        self.headers = {"Authorization": f"Bearer {key.strip()}"} if key and key.strip() else {}
        self.limiter = RateLimiter(config.requests_per_minute)
        self.session = requests.Session()
        retry = Retry(
            total=config.max_retries,
            status_forcelist=RETRIED,
            allowed_methods=None,
            backoff_factor=1.0,
            backoff_max=MAX_WAIT_SECONDS,
            backoff_jitter=0.5,
            raise_on_status=False,
            retry_after_max=MAX_RETRY_AFTER_SECONDS,
        )
        adapter = HTTPAdapter(max_retries=retry, pool_maxsize=config.max_concurrency)
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)

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
        found = self._ask_all(list(bodies.values()), counts)
        verdicts = {key: found[i] for i, key in enumerate(bodies)}
        for i in asked:
            straight, swapped = verdicts[i, False], verdicts[i, True]
            if straight is None or swapped is None:
                wins[i], consistent[i] = torch.nan, False
            else:
                wins[i], consistent[i] = (straight + 1 - swapped) / 2, straight == 1 - swapped
        cost = counts["input_tokens"] * self.config.input_price + counts["output_tokens"] * self.config.output_price
        named = ("requests", "cached", "refused", "unreadable", "rejected", "input_tokens", "output_tokens")
        return Preferences(
            wins=wins,
            consistent=consistent,
            counts={name: float(counts[name]) for name in named} | {"cost": cost / 1e6},
        )

    def _body(self, prompt: Prompt, a: str, b: str) -> dict[str, Any]:
        question = f"[Prompt]\n{prompt_text(prompt)}\n\n[Response A]\n{a}\n[End of response A]\n\n[Response B]\n{b}\n[End of response B]"
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": [
                {"role": "system", "content": self.rubric.strip()},
                {"role": "user", "content": f"{question}\n\n{INSTRUCTION}"},
            ],
            "temperature": 0,
            "max_tokens": self.config.max_tokens,
            **self.config.extra_body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _ask_all(self, bodies: Sequence[dict[str, Any]], counts: Counter[str]) -> list[float | None]:
        """1 if the answer prefers A, 0 if B, 0.5 for a tie, None without a verdict. Equal requests are sent once."""
        keys = [request_digest(self.address, body) for body in bodies]
        answers = {key: answer for key in keys if (answer := self.answers.get(key))}
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in answers}
        counts["cached"] += len(answers)
        if missing:
            self.log(
                f"asking {self.config.model} {len(missing):,} questions; {len(answers):,} are answered in the cache"
            )
        rejections: list[str] = []
        executor = ThreadPoolExecutor(self.config.max_concurrency)
        try:
            futures = {executor.submit(self._ask_and_keep, key, body): key for key, body in missing.items()}
            logged = time.monotonic()
            for number, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                if isinstance(result, str):
                    rejections.append(result)
                else:
                    answers[futures[future]] = result
                    counts["requests"] += 1
                    counts["input_tokens"] += result.input_tokens
                    counts["output_tokens"] += result.output_tokens
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    self.log(f"{self.config.model} has answered {number} of {len(futures)} requests")
        finally:
            executor.shutdown(cancel_futures=True)  # what is on its way is paid for
            self.answers.flush()
        if rejections and not answers:
            raise InputError(
                f"{self.address} rejects every request ({rejections[0]}); correct the settings of the judge."
            )
        counts["rejected"] += len(rejections)
        verdicts = {key: read_verdict(answer) for key, answer in answers.items()}
        for key, answer in answers.items():
            if verdicts[key] is None:
                counts["refused" if answer.refused else "unreadable"] += 1
        return [verdicts.get(key) for key in keys]

    def _ask_and_keep(self, key: str, body: dict[str, Any]) -> Answer | str:
        answer = self._ask(body)
        if isinstance(answer, Answer):
            self.answers.put(key, answer)
        return answer

    def _ask(self, body: dict[str, Any]) -> Answer | str:
        """The answer to one request, or the reason why the server rejects just this one, such as its length."""
        self.limiter.wait()
        timeout = self.config.timeout_seconds
        try:
            response = self.session.post(
                self.address,
                json=body,
                headers=self.headers,
                timeout=(min(timeout, 30.0), timeout),
                allow_redirects=False,
            )
        except requests.RequestException as error:
            if isinstance(_cause(error), ReadTimeoutError):
                raise RetryableError(
                    f"{self.address} did not answer within {timeout:g} seconds; raise judge.timeout_seconds, or try again later."
                ) from None
            raise RetryableError(
                f"{self.address} cannot be reached ({_reason(error)}); correct judge.url, or try again later."
            ) from None
        if response.status_code in RETRIED:
            raise RetryableError(
                f"{self.address} answers {response.status_code} ({_detail(response)}) after {self.config.max_retries} retries; try "
                "again later, or set judge.requests_per_minute."
            )
        if response.status_code in (401, 403):
            raise InputError(
                f"{self.address} answers {response.status_code} ({_detail(response)}); {self._key_advice()}."
            )
        if response.status_code == 404 or response.is_redirect or response.status_code == 405:
            raise InputError(
                f"{self.address} answers {response.status_code} ({_detail(response)}); correct judge.url or judge.model."
            )
        if response.status_code != 200:
            return f"{response.status_code}: {_detail(response)}"
        return self._parse(response)

    def _key_advice(self) -> str:
        variable = self.config.api_key_variable
        if not variable:
            return "set judge.api_key_variable to the environment variable with the API key"
        if not self.headers:
            return f"set the environment variable {variable} to the API key (on a cluster, that key of the Secret cluster.secrets.judge)"
        return f"correct the API key in {variable}"

    def _parse(self, response: requests.Response) -> Answer:
        try:
            content = response.json()
            choice, usage = content["choices"][0], content.get("usage") or {}
            message, reason = choice["message"], str(choice.get("finish_reason") or "")
            text, refusal = message.get("content") or "", message.get("refusal")
            return Answer(
                content=str(text),
                finish_reason=reason,
                refused=bool(refusal) or reason == "content_filter",
                input_tokens=max(int(usage.get("prompt_tokens") or 0), 0),
                output_tokens=max(int(usage.get("completion_tokens") or 0), 0),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise InputError(
                f"{self.address} does not answer like an OpenAI-compatible API ({response.text[:80]!r}); correct judge.url."
            ) from None


class RateLimiter:
    """Spaces the starts of requests evenly."""

    def __init__(self, requests_per_minute: int | None) -> None:
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._next, self._lock = 0.0, threading.Lock()

    def wait(self) -> None:
        """Wait for the turn of this request."""
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self.interval
        time.sleep(turn - now)


def read_verdict(answer: Answer) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie: the last [[...]], or an answer that is nothing but the letter. None for anything else."""
    if answer.refused:
        return None
    found = VERDICT.findall(answer.content)
    if found:
        return FIRST_WINS[found[-1].lower()]
    bare = BARE_VERDICT.fullmatch(answer.content)
    return FIRST_WINS[bare[1].lower()] if bare else None


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the messages of a conversation with their roles, or the plain text."""
    if prompt.conversation is None:
        return prompt.prompt
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt.conversation.messages)


def _detail(response: requests.Response) -> str:
    """The message of an error response in the format of OpenAI, or its first characters."""
    try:
        content = response.json()
        error = content.get("error", content)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        text = response.text or response.reason or ""
    return " ".join(text.split())[:200]


def _cause(error: requests.RequestException) -> object:
    """What urllib3 gave up on after its retries."""
    first = error.args[0] if error.args else error
    return getattr(first, "reason", first)


def _reason(error: requests.RequestException) -> str:
    return str(_cause(error)).rpartition(": ")[2][:200] or type(error).__name__
