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
    import tempfile

    from components.register.ask import ask_person
    from components.register.describe import Outcome, as_description, as_report, lineage_of
    from components.register.model_folder import example_of, link_to, write_model_folder
    from components.register.source import source_of
    from components.rlhf.artifacts.directory import open_artifact
    from components.rlhf.artifacts.manifest import read_manifest
    from components.rlhf.text.errors import InputError, RetryableError
    from components.rlhf.tracking.registry import register_version

    # Only the manifest: the evaluation has verified the weights against it.
    model, verdict = read_manifest(policy), open_artifact(evaluation, "evaluation")
    if verdict.parents.get("policy_model") != model.digest:
        raise InputError(f"{evaluation} is not the evaluation of {policy}; pass the policy that was evaluated.")
    outcome = Outcome(str(verdict.facts["decision"]), str(verdict.facts["reason"]))
    if outcome.decision != run.config.decision:
        raise InputError(
            f"The decision of the evaluation is {outcome.decision}, but the settings expect {run.config.decision}; correct the settings."
        )
    source = source_of(run.executor_input, policy)
    prompt, longest = example_of(evaluation / "samples.jsonl")

    def register(outcome: Outcome) -> str:
        with tempfile.TemporaryDirectory(prefix="rlhf-model-") as folder:
            write_model_folder(Path(folder), link_to(source, model, example=prompt), max_new_tokens=longest)
            return register_version(
                run.tracking,
                folder=Path(folder),
                run_id=run.run_id,
                decision=outcome.decision,
                reason=outcome.reason,
                lineage={**lineage_of(model, verdict), "weights": source.uri, **outcome.approval},
                description=as_description(model, verdict, outcome, uri=source.uri),
            )

    if run.config.approval:
        outcome = ask_person(run, run.config.approval, outcome, register, digest=model.digest, evaluation=evaluation)
    version = register(outcome)
    if run.config.approval and not version and run.tracking.enabled and run.tracking.uri:
        raise RetryableError("The answer of a person could not be written to MLflow; it is kept, so try again.")
    registration = f"version {version} of the registered model" if version else "not registered (no MLflow registry)"
    name = f"{run.tracking.registered_model}/{version}" if version else ""
    report = as_report(model, verdict, outcome, registration=registration, uri=source.uri, note=source.note, name=name)
    run.write_report("summary", summary, report)
    run.progress.log(f"{outcome.decision}: {registration}")


if __name__ == "__main__":
    main(prog_name="python -m components.register")
