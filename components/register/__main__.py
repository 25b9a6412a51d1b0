"""Register the policy with its lineage in MLflow's model registry; a promoted version becomes the champion."""

import os
from pathlib import Path

import click

from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.runtime.stage import RUN_ID, input_artifact, output_path, parse_config, stage_options, stage_run


@click.command(help=__doc__)
@input_artifact("--policy", help="Trained policy.")
@input_artifact("--evaluation", "evaluation_path", help="Evaluation of the policy, with the decision and its reason.")
@output_path("--summary", help="Markdown report of the decision, the version and the lineage.")
@stage_options
def main(policy: Path, evaluation_path: Path, summary: Path, settings: str, tracking: str, executor_input: str) -> None:
    with stage_run(
        "register", RegisterStageConfig, settings=settings, tracking=tracking, executor_input=executor_input
    ) as run:
        from components.rlhf.artifacts.directory import open_artifact
        from components.rlhf.runtime.executor import input_uri
        from components.rlhf.text.errors import InputError
        from components.rlhf.tracking.mlflow import MANUAL_RUN_ID, with_environment_uri
        from components.rlhf.tracking.registry import ALIAS, register_version

        model, evaluation = open_artifact(policy, "policy_model"), open_artifact(evaluation_path, "evaluation")
        if evaluation.parents.get("policy_model") != model.digest:
            raise InputError(
                f"{evaluation_path} is not the evaluation of {policy}; pass the policy that was evaluated."
            )
        decision, reason = str(evaluation.facts["decision"]), str(evaluation.facts["reason"])
        if decision != run.config.decision:
            raise InputError(
                f"The decision of the evaluation is {decision}, but the settings expect {run.config.decision}; correct the settings."
            )
        lineage = {f"parent_{role}": digest for role, digest in model.parents.items()}
        lineage |= {"digest": model.digest, "code_revision": model.code_revision, "evaluation": evaluation.digest}
        version = register_version(
            with_environment_uri(parse_config(TrackingConfig, tracking)),
            source=input_uri(executor_input, "policy") if executor_input else str(policy.resolve()),
            run_id=os.environ.get(RUN_ID, MANUAL_RUN_ID),
            decision=decision,
            reason=reason,
            lineage=lineage,
        )
        registration = (
            f"version {version} of the registered model" if version else "not registered (no MLflow registry)"
        )
        title = f"# Promoted to {ALIAS}" if decision == "promote" else "# Rejected"
        lines = [title, "", f"{reason}.", "", f"- {registration}", f"- model digest {model.digest}"]
        lines += [f"- parent {role.replace('_', ' ')} {digest}" for role, digest in model.parents.items()]
        run.write_report("summary", summary, "\n".join(lines) + "\n")
        run.progress.log(f"{decision}: {registration}")


if __name__ == "__main__":
    main(prog_name="python -m components.register")
