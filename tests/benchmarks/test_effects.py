"""A changed setting reruns the stages that it affects, and no earlier ones."""

import pytest

from benchmarks.effects import CHANGES, LOG, ROWS, as_table
from benchmarks.record import read_rows
from benchmarks.stages import STAGE_IO, stages_to_run
from pipelines.compile import stage_names
from tests.pipelines.test_settings import MOVIES, load_params

ALL = ["prepare_data", "sft", "reward_model", "judge", "ppo", "evaluation"]


@pytest.mark.parametrize(
    ("setting", "stages"),
    [
        ("ppo.kl_coef=0.3", ["ppo", "evaluation"]),
        ("reward_model.max_steps=3", ["reward_model", "ppo", "evaluation"]),
        ("sft.max_steps=3", ["sft", "reward_model", "ppo", "evaluation"]),
        ("judge.regularisation=2", ["judge", "evaluation"]),
        ("evaluation.num_bootstrap=10", ["evaluation"]),
        ("data.min_rating_gap=2", ALL),
        (
            "ppo.rollout.sampling.temperature=0.5",
            ["reward_model", "ppo", "evaluation"],
        ),  # the reward model is calibrated on samples
        ("tracking.experiment=other", []),
    ],
)
def test_changed_setting_reruns_affected_stages_and_those_after(setting: str, stages: list[str]) -> None:
    assert stages_to_run(load_params(MOVIES), load_params(MOVIES, [setting])) == stages


@pytest.mark.parametrize("preset", CHANGES)
def test_every_change_is_valid_and_affects_a_stage(preset: str) -> None:
    before = load_params(MOVIES, [f"preset={preset}"])
    for name, settings in CHANGES[preset].items():
        after = load_params(MOVIES, [f"preset={preset}", *settings])
        assert stages_to_run(before, after), name


@pytest.mark.parametrize("stage", STAGE_IO)
def test_inputs_and_outputs_match_the_component_definition(stage: str) -> None:
    import importlib

    component = getattr(importlib.import_module(f"components.{stage}.component"), stage).component_spec
    inputs, outputs = STAGE_IO[stage]
    artifacts = {name.replace("_", "-") for name, spec in component.inputs.items() if spec.type != "String"}
    assert stage in stage_names()
    assert set(inputs) == artifacts
    assert set(outputs) == {name.replace("_", "-") for name in component.outputs}


def test_table_has_one_line_per_change_and_the_baseline_first() -> None:
    numbers = {
        "win_rate": 0.75, "win_rate_low": 0.7, "win_rate_high": 0.8, "win_rate_cut": 0.72, "kl": 4.0, "reward_sft": 0.5,
        "reward_ppo": 1.75, "distinct2_sft": 0.8, "distinct2_ppo": 0.6, "eos_rate_sft": 0.9, "eos_rate_ppo": 0.8,
    }  # fmt: skip
    history = [
        {"actor/clip_fraction": 0.125, "seconds/generate": 1.5, "seconds/update": 2.0},
        {"actor/clip_fraction": 0.5, "seconds/generate": 3.0, "seconds/update": 4.0},
    ]
    rows = [
        {"change": "hotter", "settings": ["a.b=1", "c=2"], "evaluation": numbers, "history": history},
        {"change": "baseline", "settings": [], "evaluation": numbers, "history": history},
    ]
    first, second = as_table(rows).splitlines()[2:]
    assert first.startswith("| baseline |  |")
    assert second == (
        "| hotter | `a.b=1`, `c=2` | 0.750 [0.700, 0.800] | 0.720 | 4.00 | +1.25 | 75% | 90% to 80% | 12.5% | 10 |"
    )


@pytest.mark.parametrize("preset", CHANGES)
def test_log_holds_the_table_of_the_measured_rows(preset: str) -> None:
    table = as_table([row for row in read_rows(ROWS) if row["preset"] == preset])
    assert f"<!-- {preset} -->\n{table}\n<!-- /{preset} -->" in LOG.read_text(encoding="utf-8")
