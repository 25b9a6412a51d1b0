"""Every check of a run, one after the other."""

from pathlib import Path

from components.checks.bounds import Measured, unmeasured
from components.checks.harness import measure_tasks, require_harness
from components.checks.models import Models
from components.checks.perplexity import measure_perplexity
from components.checks.prompts import Answered, answer_prompts
from components.rlhf.artifacts.check_rows import CheckRow
from components.rlhf.artifacts.code import open_code
from components.rlhf.config.checks import ChecksStageConfig, LmEvalCheck, PerplexityCheck, PromptsCheck
from components.rlhf.data.datasets import load_records
from components.rlhf.data.records import Prompt, is_chat
from components.rlhf.maths.intervals import Bootstrap
from components.rlhf.models.precision import compute_dtype
from components.rlhf.runtime.stage import StageRun
from components.rlhf.text.errors import InputError
from components.rlhf.text.redaction import redact


def measure_checks(
    run: StageRun[ChecksStageConfig],
    *,
    sft_model: Path,
    policy: Path,
    demonstrations: Path,
    prompts: Path,
    code: Path | None,
) -> tuple[list[CheckRow], dict[str, Answered]]:
    """The rows of all checks, and the answers of those of kind prompts by their names.

    A check that cannot be measured has rows that have not passed, and does not fail the run. Raises InputError before any of them if the
    code is not that of the run, or lm-evaluation-harness is missing.
    """
    config = run.config
    code = open_code(code, config.code_digest)
    if any(isinstance(check, LmEvalCheck) for check in config.checks):
        require_harness()
    models = Models(
        sft=sft_model.resolve(),
        policy=policy.resolve(),
        dtype=compute_dtype(config.model.precision),
        progress=run.progress,
    )
    bootstrap = Bootstrap(num_resamples=config.num_bootstrap, confidence=config.confidence, seed=config.seed)
    chat = any(is_chat(prompt) for prompt in load_records(prompts, "heldout", Prompt)[:1])
    rows: list[CheckRow] = []
    answers: dict[str, Answered] = {}
    for number, check in enumerate(config.checks):
        measured: list[tuple[Measured, str]]
        bounds = check.bounds
        try:
            if isinstance(check, PerplexityCheck):
                measured = [
                    (own, bound) for own in measure_perplexity(check, models, demonstrations) for bound in bounds
                ]
            elif isinstance(check, PromptsCheck):
                found = answer_prompts(number, config, models, run.storage, is_chat=chat)
                answers[check.title] = found
                measured = [(found.measured(check, bound), bound) for bound in bounds]
            else:
                measured = [(own, bound) for own in measure_tasks(check, models, code) for bound in bounds]
            new = [own.row(bound, bounds[bound], bootstrap) for own, bound in measured]
        except InputError as error:
            new = unmeasured(check.title, bounds, redact(str(error)).rstrip("."))
        for row in new:
            run.progress.log("check passed: " + f"{row.name}, {row.bound}" if row.passed else row.sentence())
        rows += new
    return rows, answers
