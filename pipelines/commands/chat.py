"""kfp-rlhf chat."""

import os
import subprocess
import sys
from pathlib import Path

import click

from pipelines.commands.options import RUN_ARGUMENT


@click.command("chat")
@RUN_ARGUMENT
@click.option(
    "--model",
    "folders",
    multiple=True,
    metavar="FOLDER",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A model folder in place of a run. May be repeated.",
)
@click.option("--plain", is_flag=True, help="Continue texts, without a chat template.")
@click.option("--greedy", is_flag=True, help="Take the most probable token in every step.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="[default: that of the evaluation]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="[default: that of the evaluation]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
def chat_command(
    run: Path | None,
    folders: tuple[Path, ...],
    temperature: float | None,
    max_tokens: int | None,
    seed: int,
    *,
    plain: bool,
    greedy: bool,
) -> None:
    """Talk to the SFT model and the policy of a run side by side, with the reward model's score of what they write.

    RUN is a run directory; the default is the newest run below runs/.

    \b
      kfp-rlhf chat
      echo "This movie" | kfp-rlhf chat runs/quick-20260101-120000
      kfp-rlhf chat --model ./my-model
    """
    from pipelines.local.chat import chat_with_folders, chat_with_run

    config = chat_with_folders(folders) if folders else chat_with_run(run)
    changes = {"temperature": temperature, "max_new_tokens": max_tokens}
    sampling = config.sampling.model_copy(update={key: value for key, value in changes.items() if value is not None})
    more = {"sampling": sampling, "seed": seed, "greedy": greedy, "is_chat": False if plain else config.is_chat}
    settings = config.model_copy(update=more).canonical_json()
    # Models are loaded by a program of its own; this process imports no torch.
    command = [sys.executable, "-m", "components.evaluation.chat", settings]
    with subprocess.Popen(command, env=os.environ | {"DS_ACCELERATOR": "cpu"}) as process:
        try:
            sys.exit(process.wait())
        except KeyboardInterrupt:  # of which Ctrl-C has told the program as well; it leaves the terminal as it was
            process.terminate()


COMMANDS = (chat_command,)
