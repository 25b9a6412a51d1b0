"""A Python function of the user, in a process of its own, so that it can neither hang nor end the stage."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.rlhf.config.scoring import Function
from components.rlhf.data.records import Completion
from components.rlhf.rewards.owner import JUDGE, Owner
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.subprocesses.child import Child, ChildError, pod_memory
from components.rlhf.text.errors import InputError

PROGRAM, SOURCE = "components.rlhf.rewards.function_process", "source.py"
GIB = 2**30


class FunctionScorer:
    """Scores by FUNCTION(prompts, responses), two lists of strings, or with the columns of each prompt. Implements Scorer.

    Its process lives until close, so that it imports and loads once. A call in which it crashes, hangs or takes too much memory is made
    once more, in a new process.
    """

    def __init__(
        self,
        config: Function,
        *,
        owner: Owner = JUDGE,
        code: Path | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        """code is a folder with the module and what it imports, on sys.path of its process alone; the source of config wins over it."""
        self.config, self.owner, self.code, self.log = config, owner, code, log
        self.max_bytes = config.memory_gib * GIB if config.memory_gib else pod_memory() / 2
        self._child: Child | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="function-")
        if config.source:
            (Path(self._folder.name) / SOURCE).write_text(config.source, encoding="utf-8")

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError if the function cannot be imported, raises, takes too long, or returns anything but B finite numbers."""
        if not completions:
            return torch.zeros(0)
        result = self._call(completions)
        if "error" in result:
            raise self._error(result["error"])
        scores = torch.tensor(result["scores"], dtype=torch.float32)
        if len(scores) != len(completions):
            raise self._error(f"returned {len(scores)} scores for {len(completions)} responses")
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            response = completions[bad[0]].response[:80]
            raise self._error(f"scored the response {response!r} as {float(scores[bad[0]])}")
        return scores

    def close(self) -> None:
        """End the process; the next call would start a new one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def _call(self, completions: Sequence[Completion]) -> dict[str, Any]:
        module, _, name = self.config.function.partition(":")
        request = {
            "module": module,
            "function": name,
            "source": str(Path(self._folder.name) / SOURCE) if self.config.source else "",
            "code": str(self.code or ""),
            "prompts": [c.prompt.prompt for c in completions],
            "responses": [c.response for c in completions],
            "columns": [dict(c.prompt.columns) for c in completions],
        }
        for attempt in (1, 2):
            self._child = self._child or Child(PROGRAM)
            try:
                return self._child.call(request, seconds=self.config.timeout_seconds, max_bytes=self.max_bytes)
            except ChildError as error:
                self.close()
                problem = self._problem(error)
                if attempt == 1:
                    self.log(
                        f"{self.owner.title}: {self.config.function} {problem}; it is called again in a new process"
                    )
        raise self._error(problem)

    def _problem(self, error: ChildError) -> str:
        if error.reason == "late":
            limit = self.config.timeout_seconds
            return f"did not return within {limit:g} seconds; raise {self.owner.key}.timeout_seconds if it needs more"
        if error.reason == "memory":
            limit = self.max_bytes / GIB
            return f"took more than {limit:.3g} GiB of memory; raise {self.owner.key}.memory_gib if it needs more"
        return "ended without a result; its output is above"

    def _error(self, problem: str) -> InputError:
        return InputError(f"The {self.owner.title}'s function {self.config.function} {problem}; correct the function.")
