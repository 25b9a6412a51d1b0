"""Import a model from a folder, S3, the Hugging Face Hub or a Python package, so that later stages work offline."""

from pathlib import Path

from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "import_model",
    ImportModelStageConfig,
    reads={},
    writes={
        "model": "Model in the Hugging Face format, with manifest.json.",
        "tokenizer": "The files of the model without its weights.",
    },
)
def main(run: StageRun[ImportModelStageConfig], model: Path, tokenizer: Path) -> None:
    from components.import_model.importer import copy_without_weights, import_model
    from components.rlhf.artifacts.directory import atomic_directory
    from components.rlhf.artifacts.manifest import write_manifest
    from components.rlhf.data.tokenizer import chat_template_digest, tokenizer_digest
    from components.rlhf.storage.copy import local_copy

    run.progress.log(f"importing {run.config.source} as {run.config.kind}")
    source = run.config.source
    with local_copy(source, run.storage, run.progress.log) as local, atomic_directory(model) as folder:
        loaded, facts = import_model(run.config.model_copy(update={"source": local}), folder, run.progress.log)
        facts["source"] = source
        manifest = write_manifest(
            folder,
            kind=run.config.kind,
            settings=run.settings_text,
            tokenizer_digest=tokenizer_digest(loaded),
            chat_template_digest=chat_template_digest(loaded),
            facts=facts,
        )
    run.report_output("model", manifest)
    run.write_artifact(
        "tokenizer",
        tokenizer,
        lambda folder: copy_without_weights(model, folder),
        kind="tokenizer",
        parents={run.config.kind: manifest},
        facts={},
        tokenizer_of=manifest,
    )
    run.progress.log(f"{facts['num_parameters']:,} parameters in {facts['num_layers']} layers, written to {model}")


if __name__ == "__main__":
    main(prog_name="python -m components.import_model")
