"""A judge behind an OpenAI-compatible API: it reads a prompt and two responses, in both orders, and names the better one."""

import json
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.exceptions import HTTPError, ReadTimeoutError

from components.rlhf.config.judge import EndpointJudge as EndpointConfig
from components.rlhf.data.records import Completion, Prompt
from components.rlhf.rewards.answers import Answer, AnswerCache, request_digest
from components.rlhf.rewards.protocol import Preferences
from components.rlhf.text.errors import InputError, RetryableError

RETRIED = (408, 409, 425, 429)  # and all from 500
SECONDS = 1.0  # the unit of waits between retries
MAX_WAIT_SECONDS, MAX_RETRY_AFTER_SECONDS, LOG_SECONDS = 60.0, 120.0, 15.0
MAX_FAILURES_IN_A_ROW = 3  # of requests after their retries: then the endpoint is taken to be down
MAX_BODY_BYTES = 16 * 2**20
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
        self.config, self.answers, self.log = config, answers, log
        self.address = f"{config.url}/chat/completions"
        self.rubric = config.rubric or (Path(__file__).parent / "rubric.txt").read_text(encoding="utf-8")
        self.key = os.environ.get(config.api_key_variable or "", "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(
                f"The API key in {config.api_key_variable} contains characters that no key has; correct it."
            )
        self.session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=config.max_concurrency)
        self.session.mount("https://", adapter)
        self.session.mount("http://", adapter)
        self.session.auth = self._set_key  # without it, requests would send the credentials of a ~/.netrc

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
        """1 if the answer prefers A, 0 if B, 0.5 for a tie, None without a verdict. Equal requests are sent once.

        An answer without a verdict is not reused from the cache, unless it is a refusal: what made it unreadable may be mended.
        """
        keys = [request_digest(self.address, body) for body in bodies]
        known = {key: answer for key in keys if (answer := self.answers.get(key))}
        answers = {key: answer for key, answer in known.items() if answer.refused or read_verdict(answer) is not None}
        missing = {key: body for key, body in zip(keys, bodies, strict=True) if key not in answers}
        counts["cached"] += len(answers)
        if missing:
            self.log(
                f"asking {self.config.model} {len(missing):,} questions; {len(answers):,} are answered in the cache"
            )
        calls = Calls(requests_per_minute=self.config.requests_per_minute)
        failures: list[Failure] = []
        failures_in_a_row = 0
        executor = ThreadPoolExecutor(self.config.max_concurrency)
        try:
            futures = {executor.submit(self._ask_and_keep, key, body, calls): key for key, body in missing.items()}
            logged = time.monotonic()
            for number, future in enumerate(as_completed(futures), start=1):
                result = future.result()
                if isinstance(result, Failure):
                    failures.append(result)
                    failures_in_a_row += not result.is_rejection
                    if failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                        raise result.error()
                else:
                    failures_in_a_row = 0
                    answers[futures[future]] = result
                    counts["requests"] += 1
                    counts["input_tokens"] += result.input_tokens
                    counts["output_tokens"] += result.output_tokens
                if time.monotonic() - logged > LOG_SECONDS:
                    logged = time.monotonic()
                    self.log(f"{self.config.model} has answered {number} of {len(futures)} requests")
        finally:
            calls.stopped.set()
            executor.shutdown(cancel_futures=True)  # what is on its way is paid for
            self.answers.flush()
        if failures and not answers:
            raise failures[0].error()
        if failures:
            self.log(f"{len(failures)} requests have no answer; the first: {failures[0].message}")
        counts["rejected"] += len(failures)
        verdicts = {key: read_verdict(answer) for key, answer in answers.items()}
        for key, answer in answers.items():
            if verdicts[key] is None:
                counts["refused" if answer.refused else "unreadable"] += 1
        return [verdicts.get(key) for key in keys]

    def _ask_and_keep(self, key: str, body: dict[str, Any], calls: "Calls") -> "Answer | Failure":
        """The answer to one request, after retries. Raises InputError for what no request of this judge can succeed with."""
        failure = Failure(message=f"{self.address} was not asked", is_rejection=False)
        for attempt in range(self.config.max_retries + 1):
            if attempt and not calls.wait_before_retry(attempt, failure.retry_after):
                break
            calls.wait_for_turn()
            if calls.stopped.is_set():
                break
            result = self._ask(body)
            if isinstance(result, Answer):
                self.answers.put(key, result)
                return result
            failure = result
            if failure.is_rejection:
                break
        return failure

    def _ask(self, body: dict[str, Any]) -> "Answer | Failure":
        timeout = self.config.timeout_seconds
        try:
            response = self.session.post(
                self.address, json=body, timeout=(min(timeout, 30.0), timeout), allow_redirects=False, stream=True
            )
            content = _read_within(response, timeout)
        except (requests.Timeout, ReadTimeoutError, TimeoutError):
            return Failure(
                message=f"{self.address} did not answer within {timeout:g} seconds; raise judge.timeout_seconds, or try again later"
            )
        except (requests.RequestException, HTTPError) as error:
            return Failure(
                message=f"{self.address} cannot be reached ({_reason(error)}); correct judge.url, or try again later"
            )
        status, detail = response.status_code, _detail(content, response.reason)
        if status in RETRIED or status >= 500:
            try:
                retry_after = float(response.headers.get("Retry-After", ""))
            except ValueError:
                retry_after = 0.0
            return Failure(
                message=f"{self.address} answers {status} ({detail}) after {self.config.max_retries} retries; try again later, or set "
                "judge.requests_per_minute",
                retry_after=retry_after,
            )
        if status in (401, 403):
            raise InputError(f"{self.address} answers {status} ({detail}); {self._key_advice()}.")
        if status in (404, 405) or response.is_redirect:
            raise InputError(f"{self.address} answers {status} ({detail}); correct judge.url or judge.model.")
        if status != 200:
            return Failure(
                message=f"{self.address} rejects the request ({status}: {detail}); correct the settings of the judge",
                is_rejection=True,
            )
        return parse_answer(content) or Failure(
            message=f"{self.address} does not answer like an OpenAI-compatible API ({_one_line(content)[:80]!r}); correct judge.url"
        )

    def _set_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _key_advice(self) -> str:
        variable = self.config.api_key_variable
        if not variable:
            return "set judge.api_key_variable to the environment variable with the API key"
        if not self.key:
            return f"set the environment variable {variable} to the API key (on a cluster, that key of the Secret cluster.secrets.judge)"
        return f"correct the API key in {variable}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no answer: a rejection concerns this request alone, anything else may concern all."""

    message: str  # a sentence without the full stop
    is_rejection: bool = False
    retry_after: float = 0.0  # seconds that the server asks to wait

    def error(self) -> InputError:
        return (InputError if self.is_rejection else RetryableError)(f"{self.message}.")


class Calls:
    """Spaces the starts of requests evenly, and ends all waiting when stopped is set."""

    def __init__(self, *, requests_per_minute: int | None) -> None:
        self.interval = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.stopped = threading.Event()
        self._next, self._lock = 0.0, threading.Lock()

    def wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(self._next, now)
            self._next = turn + self.interval
        self.stopped.wait(turn - now)

    def wait_before_retry(self, attempt: int, retry_after: float) -> bool:
        """Wait 1, 2, 4... seconds, or as long as the server asks, within limits; False if all requests are to end."""
        wait = max(min(2.0 ** (attempt - 1), MAX_WAIT_SECONDS), min(retry_after, MAX_RETRY_AFTER_SECONDS))
        return not self.stopped.wait(wait * SECONDS * random.uniform(1.0, 1.25))


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


def read_verdict(answer: Answer) -> float | None:
    """1 for A, 0 for B, 0.5 for a tie: the [[...]] at the end, or an answer that is nothing but the letter. None for anything else."""
    if answer.refused or answer.finish_reason == "length":
        return None
    found = VERDICT.search(answer.content) or BARE_VERDICT.fullmatch(answer.content)
    return FIRST_WINS[found[1].lower()] if found else None


def prompt_text(prompt: Prompt) -> str:
    """A prompt as people read it: the messages of a conversation with their roles, or the plain text."""
    if prompt.conversation is None:
        return prompt.prompt
    return "\n\n".join(f"{m.role.capitalize()}: {m.content}" for m in prompt.conversation.messages)


def _read_within(response: requests.Response, seconds: float) -> bytes:
    """The body. Raises TimeoutError if it takes longer than this, however often something arrives."""
    deadline, content = time.monotonic() + seconds, b""
    while chunk := response.raw.read1(2**16, decode_content=True):  # what has arrived
        content += chunk
        if time.monotonic() > deadline or len(content) > MAX_BODY_BYTES:
            response.close()
            raise TimeoutError
    return content


def _detail(content: bytes, default: str) -> str:
    """The message of an error response in the format of OpenAI, or its first characters."""
    try:
        parsed = json.loads(content)
        error = parsed.get("error", parsed)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError, RecursionError):
        text = _one_line(content) or default or ""
    return " ".join(text.split())[:200]


def _one_line(content: bytes) -> str:
    return " ".join(content[:1000].decode("utf-8", errors="replace").split())


def _reason(error: requests.RequestException | HTTPError) -> str:
    first = error.args[0] if error.args else error
    return str(getattr(first, "reason", first)).rpartition(": ")[2][:200] or type(error).__name__
