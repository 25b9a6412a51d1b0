"""Writes the outputs of an evaluation: the artifact, the reports, the metrics and the decision."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.evaluation.measure import Measured
from components.evaluation.report import as_html, as_markdown
from components.evaluation.rival import SAMPLED_WITH, sampling_digest, save_responses
from components.evaluation.samples import save_comparison
from components.evaluation.side_by_side import compare_policies, training_costs
from components.evaluation.verdict import Decision
from components.rlhf.artifacts.check_rows import CheckRow, check_numbers, check_table, save_rows
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.config.policy import TITLES
from components.rlhf.runtime.executor import write_parameter
from components.rlhf.runtime.stage import StageRun
from components.rlhf.tracking.parent import GOES_TO_GATE


def write_outputs(
    run: StageRun[EvaluationStageConfig],
    inputs: Mapping[str, Manifest],
    measured: Measured,
    numbers: Mapping[str, float],
    verdict: Decision,
    checks: Sequence[CheckRow] = (),
    **writes: Path,
) -> None:
    """Write everything to the paths in writes, by the names of the outputs. inputs are manifests by kind, checks the rows of the checks."""
    config, comparison, policy = run.config, measured.comparison, inputs["policy_model"]
    costs = training_costs(policy.measurements)
    rival = measured.rival
    both = compare_policies(comparison, numbers, verdict, costs, rival) if rival else None
    better = both.better.method if both else config.method
    if both:
        numbers = {**numbers, GOES_TO_GATE: float(better == config.method)}

    numbers = {**numbers, **{f"checks/{name}": value for name, value in check_numbers(checks).items()}}

    def fill(folder: Path) -> None:
        save_comparison(comparison, measured.judges, numbers, measured.training, folder)
        save_responses(comparison, config.seed, folder)
        if checks:
            save_rows(checks, folder)

    facts = {"method": config.method, SAMPLED_WITH: sampling_digest(config)}
    run.write_artifact(
        "evaluation",
        writes["evaluation"],
        fill,
        kind="evaluation",
        parents=inputs,
        facts={**numbers, **facts, "decision": verdict.decision, "reason": verdict.reason},
        measurements=costs,
    )
    page = as_html(
        comparison,
        measured.judges,
        numbers,
        verdict,
        measured.training,
        seed=config.seed,
        memory=run.memory_of(inputs),
        policy=policy.facts,
        both=both,
    )
    run.write_report("report", writes["report"], page)
    summary = as_markdown(numbers, measured.judges, verdict, policy.facts, both)
    if checks:
        summary += "\n".join(["", "## Checks", "", *check_table(checks, TITLES[config.method])]) + "\n"
    run.write_report("summary", writes["summary"], summary)
    run.write_metrics(writes["metrics"], numbers)
    for name, value in (("decision", verdict.decision), ("reason", verdict.reason), ("better", better)):
        write_parameter(writes[name], value)
    run.progress.log(f"{verdict.decision}: {verdict.reason}")
    if both:
        run.progress.log(both.reason)
