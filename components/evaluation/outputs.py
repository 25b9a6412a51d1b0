"""Writes the outputs of an evaluation: the artifact, the reports, the metrics and the decision."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from components.evaluation.findings import findings_of, save_findings
from components.evaluation.measure import Measured
from components.evaluation.report import Background, as_html, as_markdown, as_picture, listing_of
from components.evaluation.rival import SAMPLED_WITH, sampling_digest, save_responses
from components.evaluation.samples import save_comparison
from components.evaluation.side_by_side import compare_policies, training_costs
from components.evaluation.tables import stage_costs
from components.evaluation.verdict import Decision
from components.rlhf.artifacts.check_rows import CheckRow, check_numbers, save_rows
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.runtime.executor import write_parameter
from components.rlhf.runtime.stage import StageRun
from components.rlhf.tracking.parent import GOES_TO_GATE

KEPT = (
    "kept_iteration",
    "kept_reason",
    "guard",
)  # facts of a policy that the evaluation repeats, for the report of another one


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
        save_findings(findings_of(numbers, measured.judges, measured.training, policy.facts), folder)
        if checks:
            save_rows(checks, folder)

    kept = {name: policy.facts[name] for name in KEPT if name in policy.facts}
    facts = {**kept, "method": config.method, SAMPLED_WITH: sampling_digest(config)}
    run.write_artifact(
        "evaluation",
        writes["evaluation"],
        fill,
        kind="evaluation",
        parents=inputs,
        facts={**numbers, **facts, "decision": verdict.decision, "reason": verdict.reason},
        measurements=costs,
    )
    background = Background(
        policy=policy.facts,
        both=both,
        rival=rival,
        costs=stage_costs(inputs, run.measurements, config.method),
        inputs=inputs,
        settings=run.settings_text,
        max_kl=config.gate.max_kl,
        checks=checks,
    )
    judges, training = measured.judges, measured.training
    page = as_html(comparison, judges, numbers, verdict, training, seed=config.seed, background=background)
    run.write_report("report", writes["report"], page, as_picture(training, background))
    listing = listing_of(comparison, judges, config.seed, rival)
    summary = as_markdown(numbers, judges, verdict, training, background, listing)
    run.write_report("summary", writes["summary"], summary)
    run.write_metrics(writes["metrics"], numbers)
    for name, value in (("decision", verdict.decision), ("reason", verdict.reason), ("better", better)):
        write_parameter(writes[name], value)
    run.progress.log(f"{verdict.decision}: {verdict.reason}")
    if both:
        run.progress.log(both.reason)
