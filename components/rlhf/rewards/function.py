"""A judge that is a Python function of the user, run in a process of its own, so that it can neither hang nor end the stage."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from components.rlhf.config.judge import FunctionJudge
from components.rlhf.data.records import Completion
from components.rlhf.rewards.protocol import ComputedStates
from components.rlhf.text.errors import InputError

CALL, RESULT, SOURCE = "call.json", "result.json", "source.py"
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
                (folder / SOURCE).write_text(self.config.source, encoding="utf-8")
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
            [sys.executable, "-u", "-m", PROGRAM, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        # Through this process, which redacts what it writes.
        printer = threading.Thread(target=_print_lines, args=(process.stdout,), daemon=True)
        printer.start()
        try:
            process.wait(timeout=self.config.timeout_seconds)
        except subprocess.TimeoutExpired:
            raise self._error(
                f"did not return within {self.config.timeout_seconds:g} seconds; raise judge.timeout_seconds if it needs more"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
            process.wait()
            printer.join(timeout=5.0)
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()

    def _error(self, problem: str) -> InputError:
        return InputError(f"The judge's function {self.config.function} {problem}; correct the function.")


def _print_lines(lines: Iterable[str] | None) -> None:
    with contextlib.suppress(ValueError):  # closed while a grandchild still held the other end
        for line in lines or ():
            print(line.rstrip("\n"), file=sys.stderr, flush=True)
