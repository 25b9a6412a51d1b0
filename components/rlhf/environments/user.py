"""Environments of the user, in processes of their own, so that they can neither hang nor end the stage."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from components.rlhf.config.environment import FunctionEnvironment
from components.rlhf.data.records import Prompt
from components.rlhf.environments.protocol import TIMED_OUT, Step
from components.rlhf.subprocesses.child import Child, ChildError, pod_memory

PROGRAM, SOURCE = "components.rlhf.environments.user_process", "source.py"
START_SECONDS = 120.0  # for the first call of a process, which imports the module
GRACE_SECONDS = 5.0  # until a process that does not interrupt its call is ended
GIB = 2**30


class UserHost:
    """Spreads the environments over processes, each of which answers one call at a time. Implements Host.

    A call that raises or is late fails its own response alone. A process that hangs beyond interruption, ends, or takes too much memory
    takes the other environments in it along; the next ones get a new process.
    """

    def __init__(
        self, config: FunctionEnvironment, *, code: Path | None = None, log: Callable[[str], None] = lambda line: None
    ) -> None:
        """code is a folder with the module and what it imports, on sys.path of the processes alone; the source of config wins over it."""
        self.config, self.log = config, log
        self._folder = tempfile.TemporaryDirectory(prefix="environment-")
        source = Path(self._folder.name) / SOURCE
        if config.source:
            source.write_text(config.source, encoding="utf-8")
        module, _, name = config.function.partition(":")
        self._class = {
            "module": module,
            "function": name,
            "source": str(source) if config.source else "",
            "code": str(code or ""),
        }
        max_bytes = config.memory_gib * GIB if config.memory_gib else pod_memory() / 2
        self._processes = [_Process(max_bytes / config.num_processes) for _ in range(config.num_processes)]

    def reset(self, prompts: Mapping[int, Prompt]) -> dict[int, str]:
        requests = {
            number: self._class | {"call": "reset", "prompt": prompt.prompt, "columns": dict(prompt.columns)}
            for number, prompt in prompts.items()
        }
        answers = self._ask(requests)
        return {number: answer["failure"] for number, answer in answers.items() if "failure" in answer}

    def step(self, texts: Mapping[int, str]) -> dict[int, Step]:
        answers = self._ask({number: {"call": "step", "text": text} for number, text in texts.items()})
        return {number: Step(**answer) for number, answer in answers.items()}

    def end(self, numbers: Sequence[int]) -> None:
        for place, process in enumerate(self._processes):
            process.end([number for number in numbers if number % len(self._processes) == place])

    def close(self) -> None:
        """End the processes; the next call would start new ones."""
        for process in self._processes:
            process.close()

    def _ask(self, requests: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The answer to each request; those of one process in the order of their numbers."""

        def ask(place: int) -> dict[int, dict[str, Any]]:
            process = self._processes[place]
            own = sorted(number for number in requests if number % len(self._processes) == place)
            return {
                number: process.ask(number, requests[number], seconds=self.config.timeout_seconds) for number in own
            }

        with ThreadPoolExecutor(len(self._processes)) as executor:
            parts = list(executor.map(ask, range(len(self._processes))))
        answers = {number: answer for part in parts for number, answer in part.items()}
        for number, answer in sorted(answers.items()):
            if "failure" in answer:
                self.log(f"environment {self.config.function}, response {number}: {answer['failure']}")
                break  # one example of a call is enough; metrics count all
        return answers


class _Process:
    """One process, and the numbers of the environments that live in it."""

    def __init__(self, max_bytes: float) -> None:
        self.max_bytes = max_bytes
        self._child: Child | None = None
        self._alive: set[int] = set()

    def ask(self, number: int, request: dict[str, Any], *, seconds: float) -> dict[str, Any]:
        is_first = self._child is None
        if request["call"] == "step" and (is_first or number not in self._alive):
            return {"failure": "was lost when the process that it shared with others ended"}
        self._child = self._child or Child(PROGRAM)
        message = {"response": number, "seconds": seconds, **request}
        limit = seconds + GRACE_SECONDS + (START_SECONDS if is_first else 0)
        try:
            answer = self._child.call(message, seconds=limit, max_bytes=self.max_bytes)
        except ChildError as error:
            self.close()
            return {"failure": _problem(error, seconds, self.max_bytes)}
        if "late" in answer:
            answer = {"failure": f"{TIMED_OUT} after {seconds:g} seconds"}
        if "failure" not in answer and request["call"] == "reset":
            self._alive.add(number)
        return answer

    def end(self, numbers: Sequence[int]) -> None:
        own = sorted(self._alive & set(numbers))
        self._alive -= set(own)
        if own and self._child is not None:
            try:
                self._child.call({"call": "end", "numbers": own}, seconds=GRACE_SECONDS)
            except ChildError:
                self.close()

    def close(self) -> None:
        self._alive.clear()
        if self._child is not None:
            self._child.close()
            self._child = None


def _problem(error: ChildError, seconds: float, max_bytes: float) -> str:
    if error.reason == "late":
        return f"{TIMED_OUT} after {seconds:g} seconds, and could not be interrupted"
    if error.reason == "memory":
        return f"took more than {max_bytes / GIB:.3g} GiB of memory"
    return "ended its process"
