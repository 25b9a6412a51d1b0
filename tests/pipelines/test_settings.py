import json
from pathlib import Path

import pytest
import yaml

from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.config.storage import SETTINGS_VARIABLE
from components.rlhf.text.errors import InputError
from pipelines.settings import dump_yaml, load_params, own_settings, settings_of_stage, settings_variable

MOVIES = Path(__file__).resolve().parents[2] / "pipelines/params/movie_reviews.yaml"
MINIMAL = """
data:
  demonstrations: {path: demos.jsonl}
  preferences: {path: pairs.jsonl}
  prompts: {path: prompts.jsonl}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def load_error(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_params(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_of_movie_reviews() -> None:
    params = load_params(MOVIES, ["ppo.num_iterations=4", "ppo.training.learning_rate=1e-5"])
    assert params.ppo.num_iterations == 4
    assert params.ppo.training.learning_rate == 1e-5
    assert params.preset == "quick"
    assert params.ppo.rollout.num_prompts == 64  # from the file


def test_override_does_not_change_another_section_with_the_same_yaml_anchor() -> None:
    params = load_params(MOVIES, ["data.prompts.path=mine.jsonl", "data.prompts.format=jsonl"])
    assert params.data.prompts.path == "mine.jsonl"
    assert params.data.preferences.path == "pypi:vaderSentiment==3.3.2"
    assert params.data.demonstrations is not None
    assert params.data.demonstrations.format == "movie_ratings"


PRESETS = (
    MINIMAL
    + """
ppo: {kl_coef: 0.2, rollout: {num_prompts: 64, sampling: {temperature: 0.7}}}
preset: small
presets:
  small: {}
  large:
    ppo: {kl_coef: 0.1, rollout: {num_prompts: 32}}
    sft: {max_steps: 9}
"""
)


@pytest.fixture
def preset_file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(PRESETS, encoding="utf-8")
    return path


def test_preset_key_of_the_file_chooses_the_preset(preset_file: Path) -> None:
    params = load_params(preset_file)
    assert (params.preset, params.ppo.kl_coef, params.ppo.rollout.num_prompts) == ("small", 0.2, 64)


def test_preset_is_merged_over_the_file_key_by_key(preset_file: Path) -> None:
    params = load_params(preset_file, ["preset=large"])
    assert (params.preset, params.ppo.kl_coef, params.ppo.rollout.num_prompts) == ("large", 0.1, 32)
    assert params.ppo.rollout.sampling.temperature == 0.7  # from the file, not overridden by the preset
    assert params.sft.max_steps == 9  # from the preset, in a section that the file does not have


def test_overrides_are_applied_after_the_preset_in_any_order(preset_file: Path) -> None:
    for overrides in (["ppo.kl_coef=0.5", "preset=large"], ["preset=large", "ppo.kl_coef=0.5"]):
        params = load_params(preset_file, overrides)
        assert (params.ppo.kl_coef, params.ppo.rollout.num_prompts) == (0.5, 32)


def test_unknown_preset_error_lists_the_presets(preset_file: Path) -> None:
    assert (
        load_error(preset_file, "preset=huge")
        == f"{preset_file} has no preset 'huge'; available presets: small, large."
    )


def test_file_with_presets_must_choose_one(preset_file: Path) -> None:
    preset_file.write_text(PRESETS.replace("preset: small\n", ""))
    assert "has no preset None; available presets: small, large" in load_error(preset_file)


@pytest.mark.parametrize("presets", ["presets: 3", "presets: [small]", "presets: {small: 3}"])
def test_presets_must_be_named_sections(preset_file: Path, presets: str) -> None:
    preset_file.write_text(MINIMAL + f"preset: small\n{presets}\n")
    assert "presets must map each name to the sections that it changes" in load_error(preset_file)


def test_misspelt_key_in_a_preset_is_rejected(preset_file: Path) -> None:
    preset_file.write_text(PRESETS.replace("{max_steps: 9}", "{max_step: 9}"))
    assert "sft.max_step is not a parameter; did you mean sft.max_steps?" in load_error(preset_file, "preset=large")


def test_preset_is_a_label_in_a_file_without_presets(preset_file: Path) -> None:
    preset_file.write_text(MINIMAL)
    assert load_params(preset_file, ["preset=mine"]).preset == "mine"


def test_dumped_preset_loads_to_the_same_params(preset_file: Path, tmp_path: Path) -> None:
    params = load_params(preset_file, ["preset=large"])
    (tmp_path / "dumped.yaml").write_text(dump_yaml(params))
    assert load_params(tmp_path / "dumped.yaml") == params


@pytest.mark.parametrize("name", ["quick", "full"])
def test_presets_of_movie_reviews_are_valid(name: str) -> None:
    assert load_params(MOVIES, [f"preset={name}"]).preset == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-4", 2.5e-4), ("3.e-4", 3e-4), ("0.001", 1e-3), ("1", 1.0)],
)
def test_scientific_notation_is_a_number(file: Path, text: str, value: float) -> None:
    assert load_params(file, [f"sft.training.learning_rate={text}"]).sft.training.learning_rate == value


@pytest.mark.parametrize(
    ("text", "value"), [("'1e5'", "1e5"), ("nan", "nan"), ("a=b", "a=b"), ("v1.0.0", "v1.0.0"), ("' x '", " x ")]
)
def test_strings_stay_strings(file: Path, text: str, value: str) -> None:
    assert load_params(file, [f"preset={text}"]).preset == value


def test_overrides_of_every_shape(file: Path) -> None:
    params = load_params(
        file,
        [
            "data.prompts.columns={prompt: question}",
            "sft.use=null",
            "tracking.enabled=false",
            " seed = 3",
            "ppo.reward_clip=",  # an empty value is null, as in YAML
            "seed=4",  # the last one wins
        ],
    )
    assert params.data.prompts.columns == {"prompt": "question"}
    assert params.sft.use is None
    assert params.tracking.enabled is False
    assert params.ppo.reward_clip is None
    assert params.seed == 4


@pytest.mark.parametrize("override", ["seed", "=3", " =3", "ppo.num_iterations 4"])
def test_override_without_key_or_value_is_rejected(file: Path, override: str) -> None:
    assert load_error(file, override) == f"--set {override!r} is not of the form SECTION.KEY=VALUE."


def test_override_below_a_value_is_rejected(file: Path) -> None:
    file.write_text(MINIMAL + "seed: 3\n", encoding="utf-8")
    assert load_error(file, "seed.x=3") == "--set 'seed.x=3': seed is not a section."


def test_override_that_is_not_yaml_is_rejected(file: Path) -> None:
    assert (
        load_error(file, "seed=[1")
        == "--set 'seed=[1': the value is not YAML (expected ',' or ']', but got '<stream end>')."
    )


def test_unknown_override_error_names_the_nearest_key(file: Path) -> None:
    message = load_error(file, "ppo.num_iteration=3")
    assert message == f"{file}: ppo.num_iteration is not a parameter; did you mean ppo.num_iterations?"


def test_error_message_ends_with_one_period(file: Path) -> None:
    assert load_error(file, "seed=x").startswith(f"{file}: seed is 'x': ")
    assert load_error(file, "gate.xyzzy=1").endswith(
        "valid here: min_win_rate, max_kl, min_prompts, checks, approval, approval_hours."
    )


def test_invalid_yaml_error_names_file_and_line(file: Path) -> None:
    file.write_text("seed: 1\nsft:\n  - a\n  b: 2\n", encoding="utf-8")
    assert load_error(file).startswith(f"{file}:4 is not YAML (")


def test_control_character_is_rejected(file: Path) -> None:
    file.write_bytes(b"seed: \x01\n")
    assert load_error(file).startswith(f"{file} is not YAML (unacceptable character")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1\n", "list"), ("seed\n", "str")])
def test_file_that_is_not_a_mapping_is_rejected(file: Path, text: str, kind: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert load_error(file) == f"{file} contains a {kind}; a params file must be a mapping of sections."


def test_file_that_is_not_utf8_is_rejected(file: Path) -> None:
    file.write_bytes("preset: Prüfung\n".encode("latin-1"))
    assert load_error(file) == f"{file} is not UTF-8; save it as UTF-8."


def test_missing_file_error_lists_the_available_files(tmp_path: Path) -> None:
    message = load_error(tmp_path / "none.yaml")
    assert message.startswith(f"{tmp_path / 'none.yaml'} does not exist; ")
    assert "movie_reviews.yaml" in message


def test_folder_is_rejected(tmp_path: Path) -> None:
    assert load_error(tmp_path) == f"{tmp_path} cannot be read (Is a directory)."


def test_dumped_params_load_to_the_same_params(tmp_path: Path) -> None:
    params = load_params(MOVIES, ["seed=9"])
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_yaml(params), encoding="utf-8")
    assert load_params(dumped) == params
    assert yaml.safe_load(dumped.read_text(encoding="utf-8"))["ppo"]["num_iterations"] == 14


@pytest.mark.parametrize("file", sorted(MOVIES.parent.glob("*.yaml")), ids=lambda file: file.stem)
def test_own_settings_are_the_params_without_defaults(file: Path) -> None:
    params = load_params(file)
    text = own_settings(params)
    assert Params.from_json(text) == params
    assert len(text) < len(params.canonical_json()) / 1.5


def test_long_settings_are_in_no_environment_variable(file: Path) -> None:
    params = load_params(file)
    assert settings_variable(params) == {SETTINGS_VARIABLE: own_settings(params)}
    long = params.model_copy(update={"preset": "x" * 20_000})
    assert settings_variable(long) == {}


def test_settings_of_a_stage_are_canonical_json(file: Path) -> None:
    params = load_params(file, ["model.source=org/name", "model.revision=abc"])
    text = settings_of_stage(params, "import_model")
    assert json.loads(text) == {
        "kind": "base_model",
        "source": "org/name",
        "revision": "abc",
        "num_frozen_layers": 0,
        "lora_modules": [],
        "quantization": None,
        "max_sequence_tokens": 1024,
        "precision": "auto",
        "is_chat": False,
    }
    assert ImportModelStageConfig.from_json(text).source == "org/name"
    assert settings_of_stage(params, "prepare_data") == params.stage(PrepareDataStageConfig).canonical_json()
    for stage in ("sft", "reward_model", "judge", "ppo", "evaluation"):
        assert json.loads(settings_of_stage(params, stage))["seed"] == 0


def test_unknown_stage_is_rejected(file: Path) -> None:
    with pytest.raises(InputError, match="train is not a stage with settings; stages: import_model, prepare_data, sft"):
        settings_of_stage(load_params(file), "train")
