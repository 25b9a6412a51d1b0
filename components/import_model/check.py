"""`kfp-rlhf check-model`: the checks of import_model, without an artifact."""

import sys
import time
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.text.errors import InputError

LABELS = {
    "conformance_gap": "largest difference from transformers",
    "end_of_text": "training ends a text with",
    "end_of_turn": "training ends a turn of a chat with",
    "stop_tokens": "sampling stops at",
    "special_prefix": "plain text begins with",
    "max_positions": "positions (0: no limit)",
}


@click.command()
@click.argument("settings")
def main(settings: str) -> None:
    """Check the model folder of settings (ImportModelStageConfig as JSON), and print the facts that a run depends on."""
    config, console, started = ImportModelStageConfig.from_json(settings), Console(file=sys.stdout), time.monotonic()
    try:
        import transformers

        from components.import_model.conformance import require_bf16
        from components.import_model.importer import check_model, load_source

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        model, tokenizer = load_source(config, Path(config.source))
        facts = check_model(config, model, tokenizer, lambda _: None)
        architecture, size = (
            f"{type(model).__name__} ({model.config.model_type})",
            sum(p.numel() for p in model.parameters()),
        )
        if config.precision != "fp32" and config.kind != "reward_model":
            require_bf16(model)
    except ModuleNotFoundError as error:
        click.echo(
            f"error: check-model needs torch and transformers (no module {error.name}); run pip install 'kfp-rlhf[cpu]', or "
            "'kfp-rlhf[gpu]'.",
            err=True,
        )
        sys.exit(1)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    table = Table(show_header=False, box=None)
    table.add_row("architecture", architecture)
    table.add_row("parameters", f"{size:,}")
    for name, label in LABELS.items():
        if name in facts:
            value = facts[name]
            table.add_row(label, f"{value:.1e} nats" if isinstance(value, float) else str(value or "none"))
    console.print(table)
    console.print(f"exact, checked in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
