"""Register the model with its lineage; a promoted one becomes champion, a rejected one gets a report that says why."""

import os
from pathlib import Path

import click

from components.rlhf.config.register import RegisterStageConfig
from components.rlhf.config.storage import TrackingConfig
from components.rlhf.runtime.stage import RUN_ID, input_artifact, output_path, parse_config, stage_options, stage_run


@click.command(help=__doc__)
@input_artifact("--policy")
@input_artifact("--evaluation", "evaluation_path")
@output_path("--summary")
@stage_options
def main(policy: Path, evaluation_path: Path, summary: Path, settings: str, tracking: str, executor_input: str) -> None:
    with stage_run(
        "register", RegisterStageConfig, settings=settings, tracking=tracking, executor_input=executor_input
    ) as run:
        from components.rlhf.artifacts.directory import open_artifact
        from components.rlhf.runtime.executor import input_uri
        from components.rlhf.text.errors import InputError
        from components.rlhf.tracking.mlflow import with_environment_uri
        from components.rlhf.tracking.registry import ALIAS, register_version

        model, evaluation = open_artifact(policy, "policy_model"), open_artifact(evaluation_path, "evaluation")
        if evaluation.parents.get("policy_model") != model.digest:
            raise InputError(
                f"{evaluation_path} is an evaluation of another model than {policy}; pass the pair that belongs together."
            )
        decision, reason = str(evaluation.facts["decision"]), str(evaluation.facts["reason"])
        if decision != run.config.decision:
            raise InputError(
                f"The evaluation says {decision}, but this branch would {run.config.decision}; the pipeline is miswired."
            )
        lineage = {f"parent_{role}": digest for role, digest in model.parents.items()}
        lineage |= {"digest": model.digest, "code_revision": model.code_revision, "evaluation": evaluation.digest}
        version = register_version(
            with_environment_uri(parse_config(TrackingConfig, tracking)),
            source=input_uri(executor_input, "policy") if executor_input else str(policy.resolve()),
            run_id=os.environ.get(RUN_ID, "by-hand"),
            decision=decision,
            reason=reason,
            lineage=lineage,
        )
        where = f"version {version} of the registered model" if version else "not registered (no MLflow registry)"
        title = f"# Promoted to {ALIAS}" if decision == "promote" else "# Rejected"
        lines = [title, "", f"{reason}.", "", f"- {where}", f"- model digest {model.digest}"]
        lines += [
            f"- {role.replace('_', ' ')} {digest}" for role, digest in lineage.items() if role.startswith("parent_")
        ]
        run.write_report("summary", summary, "\n".join(lines) + "\n")
        run.progress.log(f"{decision}: {where}")


if __name__ == "__main__":
    main(prog_name="python -m components.register")
