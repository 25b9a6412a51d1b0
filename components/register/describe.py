"""What a registered version says about itself: the description in Markdown, and the report of the stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components.rlhf.artifacts.manifest import Fact, Manifest
from components.rlhf.config.policy import TITLES
from components.rlhf.text.comparison_table import comparison_rows, method_of
from components.rlhf.tracking.registry import CHAMPION

PENDING = ""  # the decision while a person is waited for
TITLE = {"promote": f"Promoted to {CHAMPION}", "reject": "Rejected", PENDING: "Waits for approval"}


@dataclass(frozen=True)
class Outcome:
    """What becomes of a policy, and why. approval are the tags of a person's answer."""

    decision: str  # promote, reject or PENDING
    reason: str
    approval: Mapping[str, str] = field(default_factory=dict)


def lineage_of(model: Manifest, verdict: Manifest) -> dict[str, str]:
    """The method, and digests of the model, of what it was made from, and of its evaluation."""
    lineage = {f"parent_{role}": digest for role, digest in model.parents.items()}
    lineage |= {"method": str(verdict.facts.get("method", "ppo"))}
    return lineage | {"digest": model.digest, "code_revision": model.code_revision, "evaluation": verdict.digest}


def as_description(model: Manifest, verdict: Manifest, outcome: Outcome, *, uri: str) -> str:
    """The description of a version: outcome, comparison with SFT, and lineage."""
    lines = [f"**{TITLE[outcome.decision]}**: {outcome.reason}.", "", *_table(verdict.facts), ""]
    lines += [f"Weights: `{uri}`, digest `{model.digest}`. Code: `{model.code_revision}`.", ""]
    lines += [f"- parent {role.replace('_', ' ')}: `{digest}`" for role, digest in model.parents.items()]
    lines += [f"- evaluation: `{verdict.digest}`"]
    return "\n".join(lines) + "\n"


def as_report(
    model: Manifest, verdict: Manifest, outcome: Outcome, *, registration: str, uri: str, note: str, name: str
) -> str:
    """The summary of the stage in Markdown."""
    lines = [f"# {TITLE[outcome.decision]}", "", f"{outcome.reason}.", "", f"- {registration}"]
    lines += [f"- {tag.replace('_', ' ')}: {value}" for tag, value in outcome.approval.items()]
    lines += [f"- trained by {TITLES[lineage_of(model, verdict)['method']]}"]
    lines += [f"- model digest {model.digest}", f"- model at {uri}{note}"]
    lines += [f"- parent {role.replace('_', ' ')} {digest}" for role, digest in model.parents.items()]
    if name:
        lines += ["", f"Load it with `mlflow.pyfunc.load_model({f'models:/{name}'!r})`."]
    return "\n".join(lines) + "\n"


def _table(facts: Mapping[str, Fact]) -> list[str]:
    """The comparison of the policy with SFT as a table."""
    numbers = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
    rows = comparison_rows(numbers) if "confidence" in numbers else []
    lines = [f"| {row['name']} | {row['sft']} | {row['policy']} |" for row in rows]
    return [f"| | SFT | {TITLES[method_of(numbers)]} |", "|---|---:|---:|", *lines] if lines else []
