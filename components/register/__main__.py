"""Register the model with its lineage; a promoted one becomes champion, a rejected one gets a report that says why."""

import os
from pathlib import Path

import click

from components.rlhf.config.imports import RegisterStage
from components.rlhf.config.storage import TrackingSettings
from components.rlhf.edges.stage import RUN_ID, input_folder, output_path, parse_settings, stage_options, stage_run


@click.command(help=__doc__)
@input_folder("--policy")
@input_folder("--evaluation", "evaluation_path")
@output_path("--summary")
@stage_options
def main(policy: Path, evaluation_path: Path, summary: Path, settings: str, tracking: str, executor_input: str) -> None:
    with stage_run(
        "register", RegisterStage, settings=settings, tracking=tracking, executor_input=executor_input
    ) as run:
        from components.register.registry import ALIAS, register_version
        from components.rlhf.artifacts.directory import open_artifact
        from components.rlhf.edges.kfp_io import input_uri
        from components.rlhf.edges.tracking import from_environment
        from components.rlhf.errors import InputError

        model, evaluation = open_artifact(policy, "policy_model"), open_artifact(evaluation_path, "evaluation")
        if evaluation.parents.get("policy_model") != model.digest:
            raise InputError(
                f"{evaluation_path} is an evaluation of another model than {policy}; pass the pair that belongs together."
            )
        decision, reason = str(evaluation.facts["decision"]), str(evaluation.facts["reason"])
        if decision != run.settings.decision:
            raise InputError(
                f"The evaluation says {decision}, but this branch would {run.settings.decision}; the pipeline is miswired."
            )
        lineage = {f"parent_{role}": digest for role, digest in model.parents.items()}
        lineage |= {"digest": model.digest, "code_revision": model.code_revision, "evaluation": evaluation.digest}
        version = register_version(
            from_environment(parse_settings(TrackingSettings, tracking)),
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
        run.wrote_report("summary", summary, "\n".join(lines) + "\n")
        run.progress.say(f"{decision}: {where}")


if __name__ == "__main__":
    main(prog_name="python -m components.register")
