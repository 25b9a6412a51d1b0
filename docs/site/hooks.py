"""The pages of the website: the Markdown files of the repository at their paths, and the files that they link to."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[^)]*)?\)")  # a relative link or picture: text, path, heading
PICTURE = Path("docs/images/pipeline.svg")
DIAGRAM = re.compile(r"^```mermaid$.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace the files of docs/ by the pages of the repository and what they link to; those of the theme stay."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    pages = {Path(name) for name in listed if name and (ROOT / name).is_file()}
    linked = {target for page in pages for target in targets(page) if (ROOT / target).is_file()} | {PICTURE}
    of_theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(ROOT / "docs")]
    return Files(
        of_theme
        + [File.generated(config, path.as_posix(), abs_src_path=str(ROOT / path)) for path in sorted(pages | linked)]
    )


def targets(page: Path) -> Iterator[Path]:
    """What a page links to, relative to the root of the repository."""
    for match in LINK.finditer((ROOT / page).read_text(encoding="utf-8")):
        target = (ROOT / page.parent / match[2]).resolve()
        if target.is_relative_to(ROOT):
            yield target.relative_to(ROOT)


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A link to a folder leads to its README.md, one to a folder without it becomes text, and the first page has its diagram as a picture.

    The theme would load the program that draws diagrams from the network, so the other pages show their source.
    """
    folder = Path(page.file.src_uri).parent

    def resolve(match: re.Match[str]) -> str:
        target = ROOT / folder / match[2]
        if not target.is_dir():
            return match[0]
        return (
            f"[{match[1]}]({match[2].rstrip('/')}/README.md{match[3] or ''})"
            if (target / "README.md").is_file()
            else match[1]
        )

    if page.file.src_uri == "README.md":
        markdown = DIAGRAM.sub(f"![The pipeline]({PICTURE.as_posix()})", markdown)
    return LINK.sub(resolve, markdown)
