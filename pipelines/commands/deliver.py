"""Commands that take the policy of a run further: export and serve."""

import sys
from pathlib import Path

import click

from pipelines.commands.options import RUN_ARGUMENT


@click.command("export")
@RUN_ARGUMENT
@click.option(
    "--to",
    "target",
    required=True,
    metavar="TARGET",
    help="A folder, s3://BUCKET/PREFIX, or hf://OWNER/NAME (a private repository of the Hugging Face Hub).",
)
@click.option(
    "--gguf",
    type=click.Choice(["f16", "bf16", "q8_0"]),
    help="Also write model-TYPE.gguf, with llama.cpp's convert_hf_to_gguf.py.",
)
@click.option("--force", is_flag=True, help="Replace what is at TARGET.")
def export_command(run: Path | None, target: str, gguf: str | None, *, force: bool) -> None:
    """Write the policy of a run, adapters merged, with a model card.

    RUN is a run directory; the default is the newest run below runs/. S3 is reached with storage of the run's parameters and the
    credentials of the environment, the Hub with HF_TOKEN.

    \b
      kfp-rlhf export --to ./my-model
      kfp-rlhf export runs/quick-20260101-120000 --to hf://me/movie-model
    """
    from pipelines.local.export import export_policy

    export_policy(run, target, gguf=gguf, force=force, log=click.echo)


@click.command("serve")
@RUN_ARGUMENT
@click.option("--uri", metavar="URI", help="Where the model is in place of a run, such as s3://models/published/....")
@click.option("--name", metavar="NAME", help="Name of the model in requests. [default: the preset of the run]")
@click.option("--port", type=click.IntRange(1, 65_535), default=8000, show_default=True, help="Port of the server.")
@click.option("--check", is_flag=True, help="Ask the server one prompt, print its answer, and stop.")
@click.option(
    "--print",
    "form",
    type=click.Choice(["command", "kserve", "deployment"]),
    help="Start nothing; print vLLM's command, or for kubectl apply an InferenceService of KServe, or a Deployment of vLLM.",
)
def serve_command(
    run: Path | None, uri: str | None, name: str | None, port: int, form: str | None, *, check: bool
) -> None:
    """Serve the policy of a run with vLLM's OpenAI-compatible server. Ctrl-C stops it.

    RUN is a run directory; the default is the newest run below runs/.

    \b
      kfp-rlhf serve
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "quick", "prompt": "This movie"}'
      kfp-rlhf serve --print kserve --uri s3://models/published/policy | kubectl apply -f -
      kfp-rlhf serve --print deployment --uri s3://models/published/policy | kubectl apply -f -
    """
    from pipelines.local.serve import (
        inference_service,
        serve,
        server_command,
        shell_line,
        vllm_deployment,
        what_to_serve,
    )

    served = what_to_serve(run, uri, name)
    if form == "kserve":
        click.echo(inference_service(served), nl=False)
    elif form == "deployment":
        click.echo(vllm_deployment(served), nl=False)
    elif form == "command":
        click.echo(shell_line(server_command(served, port, program=["vllm", "serve"])))
    else:
        sys.exit(serve(served, port, check=check, log=click.echo))


COMMANDS = (export_command, serve_command)
