"""A judge that is a Python function of the user, run in a process of its own, so that it can neither hang nor end the stage."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from components.rlhf.config.judge import FunctionJudge
from components.rlhf.data.records import Completion
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.text.errors import InputError

CALL, RESULT = "call.json", "result.json"
PROGRAM = "components.rlhf.rewards.function_process"


class FunctionScorer:
    """Scores by FUNCTION(prompts, responses), two lists of strings. Implements Scorer."""

    def __init__(self, config: FunctionJudge) -> None:
        self.config = config

    def score(self, completions: Sequence[Completion], computed: ComputedStates | None = None) -> Tensor:
        """Raises InputError if the function cannot be imported, raises, takes too long, or returns anything but B finite numbers."""
        if not completions:
            return torch.zeros(0)
        module, _, name = self.config.function.partition(":")
        with tempfile.TemporaryDirectory(prefix="judge-") as temporary:
            folder = Path(temporary)
            if self.config.source:
                file = folder.joinpath(*module.split(".")).with_suffix(".py")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(self.config.source, encoding="utf-8")
            texts = {"prompts": [c.prompt.prompt for c in completions], "responses": [c.response for c in completions]}
            (folder / CALL).write_text(json.dumps({"module": module, "function": name, **texts}), encoding="utf-8")
            self._run(folder)
            try:
                result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise self._error("ended without a result; its output is above") from None
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

    def _run(self, folder: Path) -> None:
        # The child ends when its standard input is closed: when this process ends, however it does.
        process = subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            process.wait(timeout=self.config.timeout_seconds)
        except subprocess.TimeoutExpired:
            raise self._error(
                f"did not return within {self.config.timeout_seconds:g} seconds; raise judge.timeout_seconds if it needs more"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            if process.stdin:
                process.stdin.close()

    def _error(self, problem: str) -> InputError:
        return InputError(f"The judge's function {self.config.function} {problem}; correct the function.")
