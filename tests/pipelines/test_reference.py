"""The references of all parameters, pipelines/params/README.md, and of all commands, docs/commands.md."""

from collections import Counter

import click
import pytest

from components.rlhf.config.judge import KINDS
from components.rlhf.config.params import Params
from pipelines.__main__ import cli
from pipelines.commands import reference
from pipelines.reference import TARGET, as_markdown, leaves, merged

ROWS = merged(leaves(Params, ""))


def test_committed_reference_is_up_to_date() -> None:
    assert TARGET.read_text(encoding="utf-8") == as_markdown(), "run make compile"


def test_every_row_has_a_name_of_its_own() -> None:
    """Several kinds of judge have the same keys."""
    assert [name for name, count in Counter(name for name, _, _ in ROWS).items() if count > 1] == []


def test_every_row_has_a_default_and_a_description() -> None:
    assert [name for name, default, description in ROWS if not default or not description] == []
    assert not any("|" in text or "\n" in text for row in ROWS for text in row)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_every_kind_of_judge_are_listed(kind: str) -> None:
    names = {name.rpartition(".")[2] for name, _, _ in ROWS if name.startswith("judge")}
    assert set(KINDS[kind].model_fields) <= names


def test_sections_in_maps_and_lists_are_marked() -> None:
    names = {name for name, _, _ in ROWS}
    assert {"cluster.profiles.NAME.memory", "data.prompts.path", "ppo.kl_coef", "seed", "judge.url"} <= names


def test_committed_commands_are_up_to_date() -> None:
    assert reference.TARGET.read_text(encoding="utf-8") == reference.as_markdown(cli), "run make compile"


@pytest.mark.parametrize(("name", "text"), list(reference.help_texts(cli)))
def test_every_command_is_in_the_table_and_its_options_are_explained(name: str, text: str) -> None:
    assert f"`{name}`" in reference.HEAD
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option) and parameter.name != "seed":
            assert parameter.help or parameter.hidden, f"{name} {parameter.opts}"
    assert len(text.splitlines()) > 4
