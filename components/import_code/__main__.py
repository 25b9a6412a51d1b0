"""Make an artifact of the folder with the user's Python functions, so that its digest is in the lineage."""

from pathlib import Path

from components.rlhf.config.code import ImportCodeStageConfig
from components.rlhf.runtime.stage import StageRun, stage_program


@stage_program(
    "import_code",
    ImportCodeStageConfig,
    reads={},
    writes={"code": "Folder with the user's Python modules."},
)
def main(run: StageRun[ImportCodeStageConfig], code: Path) -> None:
    from components.rlhf.artifacts.code import copy_code, unpack_code
    from components.rlhf.artifacts.manifest import list_files
    from components.rlhf.storage.copy import local_copy
    from components.rlhf.text.errors import InputError

    config = run.config.code
    if not config.is_given:
        raise InputError("code.path is missing; set it to the folder of your functions.")

    def fill(draft: Path) -> None:
        if config.archive:
            unpack_code(config.archive, draft)
        else:
            with local_copy(str(config.path), run.storage, run.progress.log) as folder:
                copy_code(Path(folder), draft)
        run.progress.log(f"{len(list_files(draft))} files")

    run.write_artifact("code", code, fill, kind="code", parents={}, facts={})


if __name__ == "__main__":
    main(prog_name="python -m components.import_code")
