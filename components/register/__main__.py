"""Register the policy with its lineage in MLflow's model registry; a promoted version becomes the champion."""

from pathlib import Path

from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "register",
    RegisterStageConfig,
    reads={
        "policy": "Manifest of the trained policy, or the policy.",
        "evaluation": "Evaluation of the policy, with the decision and its reason.",
    },
    writes={"summary": "Markdown report of the decision, the version and the lineage."},
    uses_mlflow=True,
)
def main(run: StageRun[RegisterStageConfig], policy: Path, evaluation: Path, summary: Path) -> None:
    from components.register.source import source_of
    from components.rlhf.artifacts.directory import open_artifact
    from components.rlhf.artifacts.manifest import read_manifest
    from components.rlhf.config.policy import TITLES
    from components.rlhf.text.errors import InputError
    from components.rlhf.tracking.registry import ALIAS, register_version

    # Only the manifest: the evaluation has verified the weights against it.
    model, verdict = read_manifest(policy), open_artifact(evaluation, "evaluation")
    if verdict.parents.get("policy_model") != model.digest:
        raise InputError(f"{evaluation} is not the evaluation of {policy}; pass the policy that was evaluated.")
    decision, reason = str(verdict.facts["decision"]), str(verdict.facts["reason"])
    if decision != run.config.decision:
        raise InputError(
            f"The decision of the evaluation is {decision}, but the settings expect {run.config.decision}; correct the settings."
        )
    lineage = {f"parent_{role}": digest for role, digest in model.parents.items()}
    lineage |= {"digest": model.digest, "code_revision": model.code_revision, "evaluation": verdict.digest}
    lineage |= {"method": str(verdict.facts.get("method", "ppo"))}
    source, note = source_of(run.executor_input, policy)
    version = register_version(
        run.tracking,
        source=source,
        run_id=run.run_id,
        decision=decision,
        reason=reason,
        lineage=lineage,
    )
    registration = f"version {version} of the registered model" if version else "not registered (no MLflow registry)"
    title = f"# Promoted to {ALIAS}" if decision == "promote" else "# Rejected"
    lines = [
        title,
        "",
        f"{reason}.",
        "",
        f"- {registration}",
        f"- trained by {TITLES[lineage['method']]}",
        f"- model digest {model.digest}",
        f"- model at {source}{note}",
    ]
    lines += [f"- parent {role.replace('_', ' ')} {digest}" for role, digest in model.parents.items()]
    run.write_report("summary", summary, "\n".join(lines) + "\n")
    run.progress.log(f"{decision}: {registration}")


if __name__ == "__main__":
    main(prog_name="python -m components.register")
