"""Compare a policy with the fine-tuned model on the checks of the gate: perplexity, prompts of your own, lm-evaluation-harness."""

import os
from pathlib import Path

from components.rlhf.config.checks import ChecksStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "checks",
    ChecksStageConfig,
    reads={
        "sft_model": "Fine-tuned model, the baseline.",
        "policy": "Policy that PPO or DPO has trained.",
        "demonstrations": "Demonstrations, of which the held-out ones are used.",
        "prompts": "Held-out prompts, which say whether the run uses the chat template.",
    },
    may_read={"code": "Folder with tasks of lm-evaluation-harness."},
    writes={
        "checks": "Rows of all checks, and the answers to their prompts.",
        "metrics": "Metrics of the stage as JSON.",
        "summary": "Markdown table of the checks.",
    },
)
def main(
    run: StageRun[ChecksStageConfig],
    sft_model: Path,
    policy: Path,
    demonstrations: Path,
    prompts: Path,
    code: Path | None,
    **writes: Path,
) -> None:
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }  # before the libraries that read them are imported
    from components.checks.measure import measure_checks
    from components.rlhf.artifacts.check_rows import check_numbers, check_table, save_rows
    from components.rlhf.artifacts.directory import open_inputs
    from components.rlhf.config.policy import TITLES

    inputs = open_inputs(
        sft_model=sft_model, policy_model=policy, demonstrations=demonstrations, prompts=prompts, code=code
    )
    rows, answers = measure_checks(
        run, sft_model=sft_model, policy=policy, demonstrations=demonstrations, prompts=prompts, code=code
    )

    def fill(folder: Path) -> None:
        save_rows(rows, folder)
        for name, answered in answers.items():
            answered.save(folder / f"{name}.jsonl")

    numbers = check_numbers(rows)
    run.write_artifact("checks", writes["checks"], fill, kind="checks", parents=inputs, facts=numbers)
    lines = ["# Checks", "", *check_table(rows, TITLES[run.config.method])]
    run.write_report("summary", writes["summary"], "\n".join(lines) + "\n")
    run.write_metrics(writes["metrics"], numbers)
    failed = sum(not row.passed for row in rows)
    run.progress.log(f"{len(rows) - failed} of {len(rows)} checks passed")


if __name__ == "__main__":
    main(prog_name="python -m components.checks")
