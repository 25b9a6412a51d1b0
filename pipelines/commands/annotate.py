"""kfp-rlhf annotate."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from components.rlhf.text.errors import InputError
from pipelines.commands.options import RUN_ARGUMENT

if TYPE_CHECKING:
    from pipelines.local.annotate import Pair


@click.command("annotate")
@RUN_ARGUMENT
@click.option(
    "--pairs", "num_pairs", type=click.IntRange(min=1), default=100, show_default=True, help="Number of pairs."
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of selection, order and sides."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="FOLDER", help="[default: RUN/annotate]"
)
@click.option("--page", is_flag=True, help="Serve a page on this machine on which people answer. Ctrl-C stops it.")
@click.option("--port", type=click.IntRange(1, 65_535), default=8010, show_default=True, help="Port of the page.")
@click.option("--no-open", is_flag=True, help="Open no browser.")
@click.option(
    "--import",
    "answers",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Turn answers into preferences: answers.jsonl of --page, or an export of Argilla or Label Studio. May be repeated.",
)
def annotate_command(
    run: Path | None,
    num_pairs: int,
    seed: int,
    out: Path | None,
    port: int,
    answers: tuple[Path, ...],
    *,
    page: bool,
    no_open: bool,
) -> None:
    """Let people compare responses of the SFT model and the policy, and turn their answers into preferences for the next run.

    RUN is a run directory; the default is the newest run below runs/. A fifth of the pairs are drawn at random, the others are those on
    which judge and reward model disagree most. Raters do not see which model wrote what. docs/annotate.md explains all files.

    \b
      kfp-rlhf annotate --page
      kfp-rlhf annotate --import runs/quick-20260101-120000/annotate/answers.jsonl
    """
    from pipelines.local.annotate import make_pairs, write_pairs
    from pipelines.local.run_dir import find_run

    if page and answers:
        raise InputError("--page collects answers and --import reads them; give one of both.")
    folder = find_run(run)
    out = out or folder / "annotate"
    if answers:
        _import(folder, out, answers)
        return
    pairs = make_pairs(folder, num_pairs, seed)
    write_pairs(pairs, out)
    click.echo(f"wrote {len(pairs)} pairs for Argilla and Label Studio to {out}; its key.jsonl is not for raters")
    if page:
        _serve(pairs, out, port, open_browser=not no_open)


def _import(run: Path, out: Path, files: tuple[Path, ...]) -> None:
    from pipelines.local.annotate_import import PREFERENCES, as_text, import_answers
    from pipelines.local.run_dir import PARAMS_FILE, read_params

    for line in as_text(import_answers(out, files)):
        click.echo(line)
    seed, written = int(read_params(run).get("seed", 0)), (out / PREFERENCES).resolve()
    source = shlex.quote(f"data.preferences={{path: {written}}}")
    click.echo(
        f"wrote {written}\n"
        f"Runs with seed {seed} hold their prompts out; another seed trains on most of them:\n"
        f"  kfp-rlhf run {shlex.quote(str(run / PARAMS_FILE))} --set {source} --set seed={seed + 1}"
    )


def _serve(pairs: "list[Pair]", out: Path, port: int, *, open_browser: bool) -> None:
    from pipelines.commands.results import has_browser
    from pipelines.local.annotate_page import FILE, AnswerFile, make_server
    from pipelines.local.web import require_free_port

    answers = AnswerFile(out / FILE, pairs)
    require_free_port(port)
    server = make_server(pairs, answers, port)
    address = f"http://127.0.0.1:{port}"
    click.echo(f"The page is at {address}; answers go to {answers.path}. Press Ctrl-C to stop it.")
    if open_browser and has_browser():
        click.launch(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        click.echo()
    finally:
        server.server_close()


COMMANDS = (annotate_command,)
