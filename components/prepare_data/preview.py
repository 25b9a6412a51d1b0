"""`kfp-rlhf data`: prepare_data without artifacts, shown in the terminal and as an HTML page."""

import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from components.prepare_data.examples import ShownExample
from components.rlhf.config.prepare_data import PreviewConfig
from components.rlhf.text.errors import InputError

STYLES = {"context": "dim", "learned": "black on green", "chosen": "black on green", "rejected": "black on red"}


@click.command()
@click.argument("settings")
@click.option("--rows", type=click.IntRange(min=0), default=1000, help="Records to read of each source; 0 reads all.")
@click.option("--html", type=click.Path(path_type=Path), help="HTML file to write.")
def main(settings: str, rows: int, html: Path | None) -> None:
    """Show the data of settings (PreviewConfig as JSON)."""
    try:
        preview(PreviewConfig.from_json(settings), rows or None, html, Console(file=sys.stdout))
    except ModuleNotFoundError as error:
        click.echo(
            f"error: data needs torch and transformers (no module {error.name}); run pip install 'kfp-rlhf[cpu]'.",
            err=True,
        )
        sys.exit(1)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)


def preview(config: PreviewConfig, max_rows: int | None, html: Path | None, console: Console) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    from components.prepare_data.prepare import prepare
    from components.prepare_data.report import (
        as_html,
        first_cases,
        length_rows,
        log_lines,
        shown_examples,
        sizes,
        source_rows,
    )
    from components.prepare_data.sources import download_sources
    from components.prepare_data.tokenizer_source import tokenizer_of

    data, seed = config.prepare_data.data, config.prepare_data.seed
    tokenizer = tokenizer_of(config.model.source, config.model.revision, config.storage)
    with download_sources(data, config.storage) as local_data:
        prepared = prepare(
            local_data,
            tokenizer,
            seed=seed,
            num_evaluation_prompts=config.prepare_data.num_evaluation_prompts,
            max_rows=max_rows,
        )
    examples = shown_examples(prepared, data, tokenizer, seed=seed)
    if max_rows:
        console.print(f"The first {max_rows:,} records of each source; --rows 0 reads all.", highlight=False)
    for line in log_lines(prepared, data):
        console.print(line, highlight=False, markup=False)
    for row in source_rows(prepared):
        if row["unread"] != "none":
            console.print(f"{row['source']}: columns not read: {row['unread']}", highlight=False, markup=False)
    for case in first_cases(prepared):
        console.print(f"  {case}", style="yellow", highlight=False, markup=False)
    console.print(", ".join(f"{size:,} {name}" for name, size in sizes(prepared).items() if size), highlight=False)
    _print_table(console, length_rows(prepared))
    for example in examples:
        console.print(_as_text(example, in_color=console.color_system is not None))
    if html:
        html.write_text(as_html(prepared, data, examples), encoding="utf-8")
        console.print(f"wrote {html}", highlight=False)


def _print_table(console: Console, rows: list[dict[str, str]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in rows[0] if rows else ():
        table.add_column(name, overflow="fold", justify="right" if rows[0][name].replace(",", "").isdigit() else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row.values()))
    console.print(table)


def _as_text(example: ShownExample, *, in_color: bool) -> Text:
    """The example with its answers on a colored background, or without colors in brackets."""
    text = Text(f"\n{example.title}{' (cut to max_tokens)' if example.is_truncated else ''}\n", style="bold")
    for segment in example.segments:
        if segment.kind in ("chosen", "rejected"):
            text.append(f"\n{segment.kind}: ", style="default not bold")
        shown = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in segment.text)
        if not in_color and segment.kind != "context":
            shown = f"\u27e6{shown}\u27e7"
        text.append(shown, style=f"not bold {STYLES[segment.kind]}")
    return text


if __name__ == "__main__":
    main()
