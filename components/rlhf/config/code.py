"""Settings of the user's own Python code."""

from typing import Annotated

from pydantic import Field, model_validator

from components.rlhf.config.base import BaseConfig

# Of the archive as base64: Linux allows 128 KiB for an argument, and notify gets the archive with all other settings.
MAX_ARCHIVE_CHARS = 32 * 1024


Digest = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class CodeConfig(BaseConfig):
    """A folder of Python modules with the functions of rewards and judges, or of tasks of lm-evaluation-harness."""

    path: str | None = None
    """Folder with the modules of your functions, relative to the params file, or s3://BUCKET/PREFIX; null is none."""
    archive: str = ""
    """The folder itself as a ZIP archive in base64. Loading a params file makes it of a small folder, in place of path."""

    digest: Digest = ""
    """SHA-256 of the folder, which its artifact must have in every stage. Loading a params file computes it of a folder that is here."""

    @property
    def is_given(self) -> bool:
        """Whether the run has code."""
        return bool(self.path or self.archive)

    @model_validator(mode="after")
    def _require_one_source(self) -> "CodeConfig":
        if self.path and self.archive:
            raise ValueError("path and archive are both set; remove archive")
        if len(self.archive) > MAX_ARCHIVE_CHARS:
            raise ValueError(
                f"archive has {len(self.archive):,} characters, and {MAX_ARCHIVE_CHARS:,} are possible; set path to s3://BUCKET/PREFIX"
            )
        return self


class ImportCodeStageConfig(BaseConfig):
    code: CodeConfig
