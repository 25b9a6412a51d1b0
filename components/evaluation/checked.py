"""The checks of a run beside its judge, in the decision of the gate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from components.evaluation.verdict import Decision
from components.rlhf.artifacts.check_rows import CheckRow, read_rows
from components.rlhf.artifacts.manifest import Manifest
from components.rlhf.config.evaluation import EvaluationStageConfig
from components.rlhf.text.errors import InputError


def read_checks(folder: Path | None, inputs: Mapping[str, Manifest], config: EvaluationStageConfig) -> list[CheckRow]:
    """The rows of the checks of this policy; none in a run without checks. inputs are manifests by kind.

    Raises InputError unless they are the checks of the settings, of the same policy and the same fine-tuned model.
    """
    rows = [] if folder is None else read_rows(folder)
    found, wanted = sorted({row.check for row in rows}), sorted(config.check_names)
    if found != wanted:
        raise InputError(
            f"The settings have the checks {', '.join(wanted) or 'none'} (check_names), and the input checks has "
            f"{', '.join(found) or 'none'}; pass the checks of this run."
        )
    for kind in ("sft_model", "policy_model"):
        if folder is not None and inputs["checks"].parents.get(kind) != inputs[kind].digest:
            raise InputError(f"{folder} has checks of another {kind.replace('_', ' ')}; run the stage checks again.")
    return rows


def with_checks(decision: Decision, rows: Sequence[CheckRow]) -> Decision:
    """The decision on a policy that must also pass these checks; the reason names each one that it fails."""
    failed = "; ".join(row.sentence() for row in rows if not row.passed)
    if not failed:
        passed = f", and it passes the checks {', '.join(dict.fromkeys(row.check for row in rows))}"
        return (
            replace(decision, reason=decision.reason + passed) if rows and decision.decision == "promote" else decision
        )
    reason = failed if decision.decision == "promote" else f"{decision.reason}; {failed}"
    return Decision(decision="reject", reason=reason)
