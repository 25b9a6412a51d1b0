"""Tasks, settings, Secrets and network access of the stages that judge, for each kind of judge."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.judge import JudgeStageConfig, as_list
from components.rlhf.config.reward_model import RewardModelStageConfig
from pipelines.access import cluster_storage
from pipelines.cluster.submit import notes_on
from pipelines.cluster.upload import local_sources, plan_upload
from pipelines.compile import ROOT
from pipelines.settings import judge_reward_model_settings, load_params
from pipelines.sources import model_sources, sources_of
from tests.support.compiled_pipelines import CompiledPipeline

TINY = ROOT / "pipelines/params/tiny.yaml"
LINEAR, SECOND = "{kind: linear}", "{kind: reward_model}"
ENDPOINT = "{kind: endpoint, url: 'https://api.example.com/v1', model: gpt}"
LOCAL_SERVER = "{kind: endpoint, name: local, url: 'http://vllm.models:8000/v1', model: org/m, api_key_variable: null}"
FUNCTION = "{kind: function, function: 'yaml:dump'}"
ALL = f"[{ENDPOINT}, {LINEAR}, {SECOND}, {FUNCTION}]"
DIGESTS = tuple(
    f"cluster.images.{role}=r.example/{role}@sha256:{'ab' * 32}" for role in ("trainer", "rollout", "tools")
)
Compile = Callable[..., CompiledPipeline]
EDGES = {
    "import-model": set(),
    "prepare-data": {"import-model"},
    "sft": {"import-model", "prepare-data"},
    "reward-model": {"import-model", "prepare-data", "sft"},
    "judge": {"import-model", "prepare-data"},
    "ppo": {"prepare-data", "sft", "reward-model", "judge"},  # after the judge: a judge that fails is known before
    "evaluation": {"prepare-data", "sft", "reward-model", "judge", "ppo"},
    "gate": {"ppo", "evaluation"},
}


@pytest.fixture
def compile_with(tmp_path: Path) -> Compile:
    """Compiles the smallest params with a judge."""

    def compiled(judge: str, *overrides: str) -> CompiledPipeline:
        return CompiledPipeline(load_params(TINY, [f"judge={judge}", *overrides]), tmp_path / "compiled")

    return compiled


def stage_tasks(compiled: CompiledPipeline) -> dict[str, Any]:
    (dag,) = (dag for dag in compiled.dags if "judge" in dag["tasks"])
    tasks: dict[str, Any] = dag["tasks"]
    return tasks


def edges(compiled: CompiledPipeline) -> dict[str, set[str]]:
    return {name: set(task.get("dependentTasks", [])) for name, task in stage_tasks(compiled).items()}


def inputs_of(compiled: CompiledPipeline, task: str) -> dict[str, str]:
    """The artifacts that a task reads: its input -> TASK.OUTPUT."""
    artifacts = stage_tasks(compiled)[task]["inputs"].get("artifacts", {})
    outputs = {name: source["taskOutputArtifact"] for name, source in artifacts.items()}
    return {name: f"{output['producerTask']}.{output['outputArtifactKey']}" for name, output in outputs.items()}


def settings_of(compiled: CompiledPipeline, task: str) -> dict[str, Any]:
    parameter = stage_tasks(compiled)[task]["inputs"]["parameters"]["settings"]
    settings: dict[str, Any] = json.loads(parameter["runtimeValue"]["constant"])
    return settings


# --- tasks and edges


@pytest.mark.parametrize(
    "judge", [LINEAR, ENDPOINT, FUNCTION, f"[{LINEAR}]", f"[{ENDPOINT}, {LOCAL_SERVER}, {LINEAR}, {FUNCTION}]"]
)
def test_judges_that_are_no_reward_model_add_no_task(compile_with: Compile, judge: str) -> None:
    compiled = compile_with(judge)
    assert edges(compiled) == EDGES
    expected = {"preferences": "prepare-data.judge_preferences", "tokenizer": "import-model.tokenizer"}
    assert inputs_of(compiled, "judge") == expected  # and not the optional reward model


@pytest.mark.parametrize("judge", [SECOND, f"[{SECOND}]", ALL])
def test_second_reward_model_is_trained_on_the_preferences_of_the_judge(compile_with: Compile, judge: str) -> None:
    compiled = compile_with(judge)
    assert edges(compiled) == EDGES | {
        "reward-model-2": EDGES["reward-model"],
        "judge": {"import-model", "prepare-data", "reward-model-2"},
    }
    assert inputs_of(compiled, "judge")["reward_model"] == "reward-model-2.model"
    assert inputs_of(compiled, "reward-model-2") == inputs_of(compiled, "reward-model") | {
        "preferences": "prepare-data.judge_preferences"
    }
    # PPO and the evaluation have the first one.
    for stage in ("ppo", "evaluation"):
        assert inputs_of(compiled, stage)["reward_model"] == "reward-model.model"
    names = {name: task["taskInfo"]["name"] for name, task in stage_tasks(compiled).items()}
    assert (names["reward-model"], names["reward-model-2"]) == ("reward model", "judge reward model")
    for task in ("reward-model", "reward-model-2"):
        assert compiled.containers[task]["command"] == ["python", "-m", "components.reward_model"]
        assert compiled.pods[task]["podMetadata"] == compiled.pods["reward-model"]["podMetadata"]


@pytest.mark.parametrize("use", ["org/second", "s3://bucket/second", "/data/second"])
def test_second_reward_model_is_imported(compile_with: Compile, use: str) -> None:
    compiled = compile_with(f"{{kind: reward_model, use: '{use}'}}", "cluster.claims={/data: team}")
    assert edges(compiled) == EDGES | {
        "import-reward-model": set(),
        "reward-model-2": {"import-reward-model", "prepare-data", "sft"},
        "judge": {"import-model", "prepare-data", "reward-model-2"},
    }
    assert inputs_of(compiled, "reward-model-2")["base_model"] == "import-reward-model.model"
    assert inputs_of(compiled, "reward-model")["base_model"] == "import-model.model"
    settings = settings_of(compiled, "import-reward-model")
    assert (settings["kind"], settings["source"]) == ("reward_model", use)
    assert stage_tasks(compiled)["import-reward-model"]["taskInfo"]["name"] == "import judge model"
    assert settings_of(compiled, "reward-model-2")["reward_model"]["use"] == use
    assert settings_of(compiled, "reward-model")["reward_model"]["use"] is None


def test_both_reward_models_are_imported(compile_with: Compile) -> None:
    compiled = compile_with("{kind: reward_model, use: org/second}", "reward_model.use=org/first")
    tasks = {name: task["taskInfo"]["name"] for name, task in stage_tasks(compiled).items()}
    sources = {tasks[name]: settings_of(compiled, name)["source"] for name in tasks if name.startswith("import-reward")}
    assert sources == {"import reward model": "org/first", "import judge model": "org/second"}
    for task, source in (("reward-model", "org/first"), ("reward-model-2", "org/second")):
        importer = inputs_of(compiled, task)["base_model"].removesuffix(".model")
        assert settings_of(compiled, importer)["source"] == settings_of(compiled, task)["reward_model"]["use"] == source


def test_only_the_judge_model_is_trained(compile_with: Compile) -> None:
    compiled = compile_with(SECOND, "reward_model.use=org/first")
    assert inputs_of(compiled, "reward-model")["base_model"] == "import-reward-model.model"
    assert inputs_of(compiled, "reward-model-2")["base_model"] == "import-model.model"
    assert settings_of(compiled, "reward-model-2")["reward_model"]["use"] is None


def test_judge_has_no_optional_input(compile_with: Compile) -> None:
    """Kubeflow Pipelines 2.17.0 takes optional input artifacts for missing, also those that are passed."""
    for judge, expected in ((LINEAR, False), (SECOND, True)):
        compiled = compile_with(judge)
        args = compiled.containers["judge"]["args"]
        assert ("--reward-model" in args) == expected and not any("IfPresent" in arg for arg in args)
        component = compiled.spec["components"]["comp-judge"]["inputDefinitions"]["artifacts"]
        assert ("reward_model" in component) == expected
        assert not any("isOptional" in definition for definition in component.values())


def test_stages_that_judge_get_the_storage_settings(compile_with: Compile) -> None:
    tasks = stage_tasks(compile_with(LINEAR))
    for stage in ("judge", "evaluation"):
        assert tasks[stage]["inputs"]["parameters"]["storage"] == {
            "componentInputParameter": "pipelinechannel--storage"
        }
        args = compile_with(LINEAR).containers[stage]["args"]
        assert args[args.index("--storage") + 1] == "{{$.inputs.parameters['storage']}}"


# --- settings


@pytest.mark.parametrize(("seed", "other"), [(0, 1), (7, 8), (2**31 - 1, 0)])
def test_settings_of_the_second_reward_model(seed: int, other: int) -> None:
    section = (
        "reward_model.init=base",
        "reward_model.num_calibration_samples=99",
        "reward_model.training.learning_rate=0.5",
    )
    for use, first_use in itertools.product((None, "org/second"), (None, "org/first")):
        judge = f"judge=[{{}}, {{kind: reward_model, use: {json.dumps(use)}}}]"
        overrides = (f"seed={seed}", f"reward_model.use={json.dumps(first_use)}", *section)
        params = load_params(TINY, [judge, *overrides])
        config = RewardModelStageConfig.from_json(judge_reward_model_settings(params))
        first = params.stage(RewardModelStageConfig)
        assert (config.seed, config.reward_model.use, config.reward_model.num_calibration_samples) == (other, use, 0)
        assert (first.seed, first.reward_model.use, first.reward_model.num_calibration_samples) == (seed, first_use, 99)
        # All else is as in the params file; a model that is imported is measured in the processes of training.
        expected = params.reward_model.model_copy(update={"use": use, "num_calibration_samples": 0})
        assert config.reward_model == expected and config.reward_model.init == "base"
        assert (config.model, config.sampling, config.checkpoint) == (first.model, first.sampling, first.checkpoint)


def test_settings_of_the_stages_that_judge_hold_every_judge(compile_with: Compile) -> None:
    compiled = compile_with(ALL)
    config = JudgeStageConfig.model_validate(settings_of(compiled, "judge"))
    assert settings_of(compiled, "evaluation")["judge"] == settings_of(compiled, "judge")["judge"]
    assert [judge.title for judge in as_list(config.judge)] == ["endpoint", "linear", "reward_model", "function"]


def test_judges_do_not_change_the_settings_of_other_stages(compile_with: Compile) -> None:
    """With which their checkpoints and cached outputs stay valid."""
    before, after = compile_with(LINEAR), compile_with(ALL)
    for stage in ("import-model", "prepare-data", "sft", "reward-model", "ppo"):
        assert settings_of(before, stage) == settings_of(after, stage)


# --- Secrets, labels and caching


@pytest.mark.parametrize(
    ("judge", "keys"),
    [
        (LINEAR, []),
        (SECOND, []),
        (FUNCTION, []),
        (LOCAL_SERVER, []),
        (ENDPOINT, ["OPENAI_API_KEY"]),
        (ALL, ["OPENAI_API_KEY"]),
        (f"[{LINEAR}, {LOCAL_SERVER}, {ENDPOINT}]", ["OPENAI_API_KEY"]),
        (
            "[{kind: endpoint, name: a, url: 'https://a/v1', model: m, api_key_variable: Z_KEY}, "
            "{kind: endpoint, name: b, url: 'https://b/v1', model: m, api_key_variable: A_KEY}, "
            "{kind: endpoint, name: c, url: 'https://b/v1', model: n, api_key_variable: A_KEY}]",
            ["A_KEY", "Z_KEY"],
        ),
    ],
)
def test_only_stages_that_ask_an_endpoint_get_its_keys(compile_with: Compile, judge: str, keys: list[str]) -> None:
    compiled = compile_with(judge)
    expected = {"judge": keys, "evaluation": keys} if keys else {}
    secrets = {stage: compiled.secrets(stage) for stage in compiled.pods}
    assert {s: found["rlhf-judge?"][1] for s, found in secrets.items() if "rlhf-judge?" in found} == expected
    assert not any("rlhf-judge" in found for found in secrets.values())  # it is optional
    assert not any("rlhf-s3" in found or "rlhf-hf-token?" in found for found in secrets.values())


def test_secret_of_the_judge_has_another_name_or_none(compile_with: Compile) -> None:
    other = compile_with(ENDPOINT, "cluster.secrets.judge=team-keys")
    assert other.secrets("judge")["team-keys?"] == (True, ["OPENAI_API_KEY"])
    none = compile_with(ENDPOINT, "cluster.secrets.judge=null")
    assert set(none.secrets("judge")) == set(none.secrets("evaluation")) == {"rlhf-mlflow?"}


@pytest.mark.parametrize(
    ("judge", "asking"),
    [
        (LINEAR, set()),
        (SECOND, set()),
        (FUNCTION, set()),
        (ENDPOINT, {"judge", "evaluation"}),
        (LOCAL_SERVER, {"judge", "evaluation"}),
        (ALL, {"judge", "evaluation"}),
    ],
)
def test_only_stages_that_ask_an_endpoint_have_its_label(compile_with: Compile, judge: str, asking: set[str]) -> None:
    compiled = compile_with(judge, "model.source=org/model")
    labels = {stage: pod["podMetadata"]["labels"].get("kfp-rlhf/egress") for stage, pod in compiled.pods.items()}
    assert {stage for stage, label in labels.items() if label == "endpoint"} == asking
    assert {stage for stage, label in labels.items() if label == "hub"} == {"import-model", "prepare-data"}


def test_import_of_the_judge_model_gets_what_it_needs(compile_with: Compile) -> None:
    hub = compile_with("{kind: reward_model, use: org/second}")
    assert hub.secrets("import-reward-model")["rlhf-hf-token?"] == (True, ["HF_TOKEN"])
    assert hub.pods["import-reward-model"]["podMetadata"]["labels"]["kfp-rlhf/egress"] == "hub"
    assert {s for s in hub.pods if "rlhf-hf-token?" in hub.secrets(s)} == {"import-reward-model"}
    s3 = compile_with("[{kind: linear}, {kind: reward_model, use: 's3://bucket/second'}]")
    assert {s for s in s3.pods if "rlhf-s3" in s3.secrets(s)} == {"import-reward-model"}
    assert "kfp-rlhf/egress" not in s3.pods["import-reward-model"]["podMetadata"]["labels"]
    mounted = compile_with("{kind: reward_model, use: /data/second}", "cluster.claims={/data: team}")
    (mount,) = mounted.pods["import-reward-model"]["pvcMount"]
    assert mount["mountPath"] == "/data"


def test_second_reward_model_gets_the_placement_of_the_first(compile_with: Compile) -> None:
    overrides = ("cluster.stages={reward_model: gpu-24gb}", "storage.uri=s3://b", "cluster.checkpoint_claim=shared")
    compiled = compile_with(SECOND, *overrides)
    first, second = (compiled.pods[name] for name in ("reward-model", "reward-model-2"))
    assert first == second and first["pvcMount"]
    containers = [compiled.containers[name] for name in ("reward-model", "reward-model-2")]
    assert containers[0] == containers[1] and containers[0]["resources"]["accelerator"]
    assert compiled.secrets("reward-model") == compiled.secrets("reward-model-2")
    assert "rlhf-s3" in compiled.secrets("reward-model-2")


def test_checkpoint_volume_is_opened_before_and_deleted_after_the_second_reward_model(compile_with: Compile) -> None:
    """One pod at a time mounts the claim: those of the two reward models, and that of PPO, run one after the other."""
    compiled = compile_with(SECOND, "cluster.checkpoint_volume={storage_class: fast}")
    tasks = stage_tasks(compiled)
    assert {"createpvc", "open-volume"} <= set(tasks["reward-model-2"]["dependentTasks"])
    assert "reward-model" in tasks["reward-model-2"]["dependentTasks"]
    assert "reward-model-2" in tasks["judge"]["dependentTasks"] and "judge" in tasks["ppo"]["dependentTasks"]
    assert "ppo" in tasks["deletepvc"]["dependentTasks"]


@pytest.mark.parametrize(
    ("judge", "cached"),
    [(LINEAR, True), (SECOND, True), (FUNCTION, True), (ENDPOINT, False), (LOCAL_SERVER, False), (ALL, False)],
)
def test_judges_behind_an_api_are_not_cached(compile_with: Compile, judge: str, cached: bool) -> None:
    """The model behind an address changes, and a cached stage would hide an address that has gone."""
    compiled = compile_with(judge, *DIGESTS)
    caching = {stage: task["cachingOptions"].get("enableCache", False) for stage, task in compiled.tasks.items()}
    assert caching["judge"] is cached
    assert caching["import-model"] and caching["prepare-data"] and not caching["evaluation"]


# --- storage


@pytest.mark.parametrize(
    ("overrides", "answers"),
    [
        ((), None),
        (("storage.uri=s3://b/rlhf",), "s3://b/rlhf/answers"),
        (("storage.uri=s3://b/rlhf/",), "s3://b/rlhf/answers"),
        (("storage.uri=/data", "cluster.claims={/data: team}"), None),
        (("storage.answers_uri=s3://b/a",), "s3://b/a"),
        (("storage.uri=s3://b/rlhf", "storage.answers_uri=s3://other/a"), "s3://other/a"),
    ],
)
def test_place_of_answers_on_a_cluster(compile_with: Compile, overrides: tuple[str, ...], answers: str | None) -> None:
    params = load_params(TINY, [f"judge={ENDPOINT}", *overrides])
    assert cluster_storage(params).answers_uri == answers
    compiled = compile_with(ENDPOINT, *overrides)
    default = compiled.spec["root"]["inputDefinitions"]["parameters"]["storage"]["defaultValue"]
    assert json.loads(default)["answers_uri"] == answers
    in_s3 = {s for s in ("judge", "evaluation") if "rlhf-s3" in compiled.secrets(s)}
    assert in_s3 == ({"judge", "evaluation"} if answers else set())
    kept = [note for note in notes_on(params) if "the answers of endpoints are not kept" in note]
    assert len(kept) == (0 if answers else 1)


def test_answers_give_no_stage_s3_without_an_endpoint(compile_with: Compile) -> None:
    for judge in (LINEAR, FUNCTION, SECOND):
        compiled = compile_with(judge, "storage.answers_uri=s3://b/a")
        assert not any("rlhf-s3" in compiled.secrets(stage) for stage in compiled.pods)
        assert not any("answers" in note for note in notes_on(load_params(TINY, [f"judge={judge}"])))
    roles = compile_with(ENDPOINT, "storage.answers_uri=s3://b/a", "cluster.secrets.s3=null")
    assert not any("rlhf-s3" in roles.secrets(stage) for stage in roles.pods)


# --- models of judges on this machine


@pytest.mark.parametrize("in_list", [False, True])
def test_local_judge_model_is_uploaded(tmp_path: Path, in_list: bool) -> None:
    folder = tmp_path / "second"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    judge = f"{{kind: reward_model, use: '{folder}'}}"
    key = "judge.2.use" if in_list else "judge.use"
    judges = f"judge=[{LINEAR}, {ENDPOINT}, {judge}]" if in_list else f"judge={judge}"
    params = load_params(TINY, [judges, "storage.uri=s3://b/rlhf"])
    assert local_sources(params) == {key: folder} and model_sources(params)[key] == str(folder)
    uploaded, files = plan_upload(params)
    ((file, name),) = files
    assert file == folder / "config.json" and name.endswith("/config.json")
    assert uploaded.reward_model_judge is not None
    assert uploaded.reward_model_judge.use == f"s3://b/rlhf/{name.removesuffix('/config.json')}"
    assert isinstance(uploaded.judge, tuple) == in_list
    assert [j.title for j in as_list(uploaded.judge)] == [j.title for j in as_list(params.judge)]
    assert uploaded.model_copy(update={"judge": params.judge}) == params
    assert local_sources(uploaded) == {}


@pytest.mark.parametrize("use", ["org/second", "s3://b/second", "/data/second"])
def test_judge_model_that_a_cluster_can_read_is_not_uploaded(use: str) -> None:
    params = load_params(TINY, [f"judge=[{{kind: reward_model, use: '{use}'}}]", "cluster.claims={/data: team}"])
    assert plan_upload(params) == (params, [])
    assert model_sources(params)["judge.0.use"] == use and use in sources_of(params)
