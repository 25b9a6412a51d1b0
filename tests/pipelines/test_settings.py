import json
from pathlib import Path

import pytest
import yaml

from components.rlhf.config.import_model import ImportModelStageConfig
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.text.errors import InputError
from pipelines.settings import dump_yaml, load_params, settings_of_stage

MOVIES = Path(__file__).resolve().parents[2] / "pipelines/params/movie_reviews.yaml"
SMALLEST = """
data:
  demonstrations: {path: demos.jsonl}
  preferences: {path: pairs.jsonl}
  prompts: {path: prompts.jsonl}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text(SMALLEST, encoding="utf-8")
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_params(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_shipped_params_are_valid_with_every_override_people_make() -> None:
    params = load_params(MOVIES, ["ppo.num_iterations=4", "ppo.training.learning_rate=1e-5"])
    assert params.ppo.num_iterations == 4
    assert params.ppo.training.learning_rate == 1e-5
    assert params.preset == "quick"
    assert params.ppo.rollout.num_prompts == 64  # of the file


def test_an_override_of_one_section_does_not_reach_another_that_shares_its_anchor() -> None:
    params = load_params(MOVIES, ["data.prompts.path=mine.jsonl", "data.prompts.format=jsonl"])
    assert params.data.prompts.path == "mine.jsonl"
    assert params.data.preferences.path == "pypi:vaderSentiment==3.3.2"
    assert params.data.demonstrations is not None
    assert params.data.demonstrations.format == "movie_ratings"


class TestPresets:
    TEXT = (
        SMALLEST
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
    def file(self, tmp_path: Path) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(self.TEXT, encoding="utf-8")
        return path

    def test_the_file_says_which_one_is_used(self, file: Path) -> None:
        params = load_params(file)
        assert (params.preset, params.ppo.kl_coef, params.ppo.rollout.num_prompts) == ("small", 0.2, 64)

    def test_another_is_laid_over_the_file_key_by_key(self, file: Path) -> None:
        params = load_params(file, ["preset=large"])
        assert (params.preset, params.ppo.kl_coef, params.ppo.rollout.num_prompts) == ("large", 0.1, 32)
        assert params.ppo.rollout.sampling.temperature == 0.7  # of the file, which the preset does not touch
        assert params.sft.max_steps == 9  # of the preset, in a section that the file does not have

    def test_other_overrides_come_after_it_wherever_they_stand(self, file: Path) -> None:
        for overrides in (["ppo.kl_coef=0.5", "preset=large"], ["preset=large", "ppo.kl_coef=0.5"]):
            params = load_params(file, overrides)
            assert (params.ppo.kl_coef, params.ppo.rollout.num_prompts) == (0.5, 32)

    def test_one_that_the_file_does_not_have_is_named_with_those_it_has(self, file: Path) -> None:
        assert refusal(file, "preset=huge") == f"{file} has no preset 'huge'; presets there: small, large."

    def test_a_file_with_presets_must_choose(self, file: Path) -> None:
        file.write_text(self.TEXT.replace("preset: small\n", ""))
        assert "has no preset None; presets there: small, large" in refusal(file)

    @pytest.mark.parametrize("presets", ["presets: 3", "presets: [small]", "presets: {small: 3}"])
    def test_presets_are_sections_by_name(self, file: Path, presets: str) -> None:
        file.write_text(SMALLEST + f"preset: small\n{presets}\n")
        assert "presets must map each name to the sections that it changes" in refusal(file)

    def test_a_misspelt_key_in_one_is_named_like_any_other(self, file: Path) -> None:
        file.write_text(self.TEXT.replace("{max_steps: 9}", "{max_step: 9}"))
        assert "sft.max_step is not a parameter; did you mean sft.max_steps?" in refusal(file, "preset=large")

    def test_without_presets_it_is_a_name(self, file: Path) -> None:
        file.write_text(SMALLEST)
        assert load_params(file, ["preset=mine"]).preset == "mine"

    def test_what_is_dumped_runs_the_same_again(self, file: Path, tmp_path: Path) -> None:
        params = load_params(file, ["preset=large"])
        (tmp_path / "again.yaml").write_text(dump_yaml(params))
        assert load_params(tmp_path / "again.yaml") == params

    @pytest.mark.parametrize("name", ["quick", "full"])
    def test_those_that_are_shipped_are_valid(self, name: str) -> None:
        assert load_params(MOVIES, [f"preset={name}"]).preset == name


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.5e-4", 2.5e-4), ("3.e-4", 3e-4), ("0.001", 1e-3), ("1", 1.0)],
)
def test_numbers_as_people_write_them(file: Path, text: str, value: float) -> None:
    assert load_params(file, [f"sft.training.learning_rate={text}"]).sft.training.learning_rate == value


@pytest.mark.parametrize(
    ("text", "value"), [("'1e5'", "1e5"), ("nan", "nan"), ("a=b", "a=b"), ("v1.0.0", "v1.0.0"), ("' x '", " x ")]
)
def test_text_stays_text(file: Path, text: str, value: str) -> None:
    assert load_params(file, [f"preset={text}"]).preset == value


def test_overrides_of_every_shape(file: Path) -> None:
    params = load_params(
        file,
        [
            "data.prompts.columns={prompt: question}",
            "sft.use=null",
            "tracking.enabled=false",
            " seed = 3",
            "ppo.reward_clip=",  # nothing is null, as in YAML
            "seed=4",  # the last one holds
        ],
    )
    assert params.data.prompts.columns == {"prompt": "question"}
    assert params.sft.use is None
    assert params.tracking.enabled is False
    assert params.ppo.reward_clip is None
    assert params.seed == 4


@pytest.mark.parametrize("override", ["seed", "=3", " =3", "ppo.num_iterations 4"])
def test_an_override_without_key_or_value(file: Path, override: str) -> None:
    assert refusal(file, override) == f"--set {override!r} is not of the form SECTION.KEY=VALUE."


def test_an_override_below_a_value(file: Path) -> None:
    file.write_text(SMALLEST + "seed: 3\n", encoding="utf-8")
    assert refusal(file, "seed.x=3") == "--set 'seed.x=3': seed is not a section."


def test_an_override_that_is_not_yaml(file: Path) -> None:
    assert (
        refusal(file, "seed=[1")
        == "--set 'seed=[1': the value is not YAML (expected ',' or ']', but got '<stream end>')."
    )


def test_an_unknown_override_names_the_nearest(file: Path) -> None:
    said = refusal(file, "ppo.num_iteration=3")
    assert said == f"{file}: ppo.num_iteration is not a parameter; did you mean ppo.num_iterations?"


def test_a_wrong_value_ends_in_one_full_stop(file: Path) -> None:
    assert refusal(file, "seed=x").startswith(f"{file}: seed is 'x': ")
    assert refusal(file, "gate.xyzzy=1").endswith("valid here: min_win_rate, max_kl.")


def test_broken_yaml_names_file_and_line(file: Path) -> None:
    file.write_text("seed: 1\nsft:\n  - a\n  b: 2\n", encoding="utf-8")
    assert refusal(file).startswith(f"{file}:4 is not YAML (")


def test_yaml_with_a_control_character(file: Path) -> None:
    file.write_bytes(b"seed: \x01\n")
    assert refusal(file).startswith(f"{file} is not YAML (unacceptable character")


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1\n", "list"), ("seed\n", "str")])
def test_yaml_that_is_no_mapping(file: Path, text: str, kind: str) -> None:
    file.write_text(text, encoding="utf-8")
    assert refusal(file) == f"{file} holds a {kind}; a params file is a mapping of sections."


def test_not_utf8(file: Path) -> None:
    file.write_bytes("preset: Prüfung\n".encode("latin-1"))
    assert refusal(file) == f"{file} is not UTF-8; save it as UTF-8."


def test_a_missing_file_names_those_that_there_are(tmp_path: Path) -> None:
    said = refusal(tmp_path / "none.yaml")
    assert said.startswith(f"{tmp_path / 'none.yaml'} does not exist; ")
    assert "movie_reviews.yaml" in said


def test_a_folder_is_no_params_file(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} cannot be read (Is a directory)."


def test_resolved_params_run_the_same_again(tmp_path: Path) -> None:
    params = load_params(MOVIES, ["seed=9"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_yaml(params), encoding="utf-8")
    assert load_params(again) == params
    assert yaml.safe_load(again.read_text(encoding="utf-8"))["ppo"]["num_iterations"] == 14


def test_settings_of_a_stage_are_canonical_json(file: Path) -> None:
    params = load_params(file, ["model.source=org/name", "model.revision=abc"])
    text = settings_of_stage(params, "import_model")
    assert text == '{"kind":"base_model","revision":"abc","source":"org/name"}'
    assert ImportModelStageConfig.from_json(text).source == "org/name"
    assert settings_of_stage(params, "prepare_data") == params.stage(PrepareDataStageConfig).canonical_json()
    for stage in ("sft", "reward_model", "judge", "ppo", "evaluation"):
        assert json.loads(settings_of_stage(params, stage))["seed"] == 0


def test_an_unknown_stage(file: Path) -> None:
    with pytest.raises(InputError, match="train is not a stage with settings; stages: import_model, prepare_data, sft"):
        settings_of_stage(load_params(file), "train")
