"""Runs without preferences and without a reward model, and runs with code of the user: settings, tasks and edges."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from components.rlhf.artifacts.code import digest_of_code, unpack_code
from components.rlhf.config.params import Params
from components.rlhf.config.prepare_data import PrepareDataStageConfig
from components.rlhf.text.errors import InputError
from pipelines.cluster.submit import check_params
from pipelines.cluster.upload import plan_upload
from pipelines.compile import compile_pipeline
from pipelines.placement import require_allowed_code
from pipelines.settings import load_params
from tests.pipelines.test_dag import edges, stages_of
from tests.support.compiled_pipelines import CompiledPipeline
from tests.support.toy_pipeline import toy_params, write_data, write_params
from tests.support.verifiable import verifiable_params

MODEL = Path("/models/base")
LENGTH = {"kind": "length", "buffer": 2}


def load(folder: Path, content: dict[str, Any], *overrides: str) -> Params:
    return load_params(write_params(folder / "p.yaml", content), overrides)


def with_code(folder: Path, content: dict[str, Any], size: int = 0) -> dict[str, Any]:
    """The content with a function of a folder of code; size is that of another file, which cannot be compressed."""
    (folder / "code").mkdir()
    (folder / "code" / "mine.py").write_text("def score(prompts, responses):\n    return [1.0 for _ in responses]\n")
    (folder / "code" / "noise.txt").write_bytes(random.Random(0).randbytes(size))
    content["ppo"]["rewards"] = [{"kind": "function", "function": "mine:score"}]
    return content | {"code": {"path": "code"}}


def dag_of(params: Params, folder: Path) -> dict[str, Any]:
    return stages_of(next(yaml.safe_load_all(compile_pipeline(params, folder / "pipeline.yaml").read_text())))


# --- the shapes of the DAG ---


def test_without_a_reward_model_no_task_trains_or_reads_one(tmp_path: Path) -> None:
    params = load(tmp_path, verifiable_params(MODEL, tmp_path))
    assert not params.uses_reward_model
    dag = dag_of(params, tmp_path)
    assert edges(dag) == {
        "import-model": set(),
        "prepare-data": {"import-model"},
        "sft": {"import-model", "prepare-data"},
        "judge": {"import-model", "prepare-data"},
        "ppo": {"prepare-data", "sft"},
        "evaluation": {"prepare-data", "sft", "judge", "ppo"},
        "gate": {"ppo", "evaluation"},
    }
    assert "judge" in dag["tasks"]["ppo"]["dependentTasks"]


@pytest.mark.parametrize("reward_model", [False, True])
def test_code_is_an_input_of_the_stages_that_call_functions(reward_model: bool, tmp_path: Path) -> None:
    content = toy_params(MODEL, write_data(tmp_path)) if reward_model else verifiable_params(MODEL, tmp_path)
    content = with_code(tmp_path, content)
    if reward_model:
        content["ppo"]["rewards"].append({"kind": "reward_model"})
    dag = dag_of(load(tmp_path, content), tmp_path)
    reads = {task for task, upstream in edges(dag).items() if "import-code" in upstream}
    assert reads == {"judge", "ppo", "evaluation"}
    assert edges(dag)["import-code"] == set()
    assert ("reward-model" in edges(dag)) == reward_model


def test_every_input_of_a_task_is_one_of_its_component(tmp_path: Path) -> None:
    """The variants of a component differ in inputs, and in nothing else that a task needs."""
    content = with_code(tmp_path, verifiable_params(MODEL, tmp_path))
    pipeline = CompiledPipeline(load(tmp_path, content), tmp_path / "out")
    for stage in ("ppo", "evaluation", "judge"):
        component = pipeline.spec["components"][pipeline.tasks[stage]["componentRef"]["name"]]
        inputs = component["inputDefinitions"]["artifacts"]
        assert set(pipeline.tasks[stage]["inputs"]["artifacts"]) == set(inputs)
        assert "reward_model" not in inputs and "code" in inputs
        assert not any(definition.get("isOptional") for definition in inputs.values())
        options = {a for a in pipeline.containers[stage]["args"] if a.startswith("--")}
        assert "--code" in options and "--reward-model" not in options
    assert pipeline.containers["import-code"]["image"].startswith("kfp-rlhf/tools")


def test_second_reward_model_as_judge_needs_no_first(tmp_path: Path) -> None:
    content = verifiable_params(MODEL, tmp_path, judge={"kind": "reward_model"})
    content["data"]["preferences"] = {"path": str(write_data(tmp_path)["preferences"])}
    dag = dag_of(load(tmp_path, content), tmp_path)
    assert edges(dag)["judge"] == {"import-model", "prepare-data", "reward-model"}
    assert edges(dag)["ppo"] == {"prepare-data", "sft"}
    assert edges(dag)["evaluation"] == {"prepare-data", "sft", "judge", "ppo"}


@pytest.mark.parametrize("code", [False, True])
def test_both_shapes_run_as_trainjobs(code: bool, tmp_path: Path) -> None:
    content = verifiable_params(MODEL, tmp_path, storage={"uri": "s3://bucket/runs"})
    content = with_code(tmp_path, content) if code else content
    content["cluster"] = {
        "launcher": "trainjob",
        "stages": {"ppo": "gpu"},
        "profiles": {"gpu": {"num_accelerators": 2}},
    }
    content["ppo"]["training"] = {"engine": "deepspeed"}
    pipeline = CompiledPipeline(load(tmp_path, content), tmp_path / "out")
    assert pipeline.containers["ppo"]["image"].startswith("kfp-rlhf/tools")
    assert "reward-model" not in pipeline.containers


# --- settings ---


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"ppo": {"rewards": [{"kind": "exact_match"}, {"kind": "reward_model"}]}},
            "data.preferences is missing, and ppo.rewards has the reward model, which is trained or measured on preferences; set it",
        ),
        ({"judge": {"kind": "linear"}}, "data.preferences is missing, and judge is compared with people's preferences"),
        (
            {"judge": [{"kind": "exact_match"}, {"kind": "function", "function": "json:loads"}]},
            "data.preferences is missing, and judge.1 is compared with people's preferences",
        ),
        (
            {"ppo": {"rewards": [{"kind": "exact_match", "column": "result"}]}},
            "ppo.rewards.0 reads the column result, which data.prompts does not keep; add it to data.prompts.keep",
        ),
        (
            {"ppo": {"rewards": [LENGTH, {"kind": "regex", "pattern": "x", "column": "b"}]}},
            "ppo.rewards.1 reads the column b, which data.prompts does not keep",
        ),
        (
            {"judge": {"kind": "numeric", "column": "value"}},
            "judge reads the column value, which data.prompts does not keep",
        ),
        (
            {"judge": [{"kind": "exact_match"}, {"kind": "json_schema", "column": "schema"}]},
            "judge.1 reads the column schema, which data.prompts does not keep",
        ),
    ],
)
def test_what_contradicts_is_refused_with_the_reason(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as caught:
        Params.model_validate(verifiable_params(MODEL, tmp_path, **sections))
    assert message in str(caught.value)


def test_rewards_without_a_column_need_none(tmp_path: Path) -> None:
    content = verifiable_params(MODEL, tmp_path)
    content["ppo"]["rewards"] = [LENGTH, {"kind": "regex", "pattern": "x"}]
    content["judge"] = {"kind": "regex", "pattern": "x"}
    del content["data"]["prompts"]["keep"]
    Params.model_validate(content)


def test_shares_go_only_to_roles_that_the_run_has(tmp_path: Path) -> None:
    weights = Params.model_validate(verifiable_params(MODEL, tmp_path)).stage(PrepareDataStageConfig).data.weights
    assert (weights.reward_model, weights.judge, weights.sft, weights.prompts) == (0.0, 0.0, 0.5, 0.5)
    movies = load_params(Path("pipelines/params/movie_reviews.yaml"))
    assert movies.stage(PrepareDataStageConfig).data == movies.data


def test_stages_that_do_not_run_need_no_price_and_no_accelerators(tmp_path: Path) -> None:
    profiles = {"cpu": {}, "paid": {"price_per_hour": 1.0}, "gpu": {"num_accelerators": 4}}
    stages = {"sft": "paid", "ppo": "paid", "reward_model": "gpu"}
    cluster = {"budget": 5.0, "profiles": profiles, "stages": stages}
    Params.model_validate(verifiable_params(MODEL, tmp_path, cluster=cluster))
    with_model = toy_params(MODEL, write_data(tmp_path)) | {"cluster": cluster}
    with pytest.raises(ValidationError, match=r"reward_model.training.num_processes is 1, and the profile gpu has 4"):
        Params.model_validate(with_model)


# --- the folder of code ---


def test_small_folder_travels_in_the_settings(tmp_path: Path) -> None:
    params = load(tmp_path, with_code(tmp_path, verifiable_params(MODEL, tmp_path)))
    assert params.code.path is None
    unpack_code(params.code.archive, tmp_path / "copy")
    assert (tmp_path / "copy" / "mine.py").read_bytes() == (tmp_path / "code" / "mine.py").read_bytes()
    assert (
        plan_upload(
            params.model_copy(
                update={
                    "data": params.data.with_paths(
                        {s.path: "s3://bucket/d.jsonl" for s in params.data.keyed_sources().values()}
                    ),
                    "model": params.model.model_copy(update={"source": "org/model"}),
                }
            )
        )[1]
        == []
    )


def test_large_folder_is_uploaded_without_its_hidden_files(tmp_path: Path) -> None:
    content = with_code(tmp_path, verifiable_params(MODEL, tmp_path), size=60_000)
    (tmp_path / "code" / ".env").write_text("KEY=1")
    content["model"]["source"] = "org/model"
    params = load(tmp_path, content)
    assert params.code.path == str(tmp_path / "code") and not params.code.archive
    with pytest.raises(InputError, match=r"set storage.uri to s3://BUCKET/PREFIX to upload it"):
        plan_upload(params)
    content["storage"] = {"uri": "s3://bucket/runs"}
    uploaded, files = plan_upload(load(tmp_path, content))
    prefix = str(uploaded.code.path).removeprefix("s3://bucket/runs/")
    assert sorted(key for _, key in files if key.startswith(prefix)) == [f"{prefix}/mine.py", f"{prefix}/noise.txt"]
    assert "sha256-" in prefix


def test_folder_in_s3_stays_there(tmp_path: Path) -> None:
    params = load(tmp_path, verifiable_params(MODEL, tmp_path, code={"path": "s3://bucket/code"}))
    assert params.code.path == "s3://bucket/code" and params.code.is_given
    pipeline = CompiledPipeline(params, tmp_path / "out")
    assert "rlhf-s3" in pipeline.secrets("import-code")


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"code.path: nowhere is not a folder next to the params file"):
        load(tmp_path, verifiable_params(MODEL, tmp_path, code={"path": "nowhere"}))


def test_secret_in_the_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = with_code(tmp_path, verifiable_params(MODEL, tmp_path))
    monkeypatch.setenv("TEAM_API_KEY", "sk-1234567890abcdef")
    (tmp_path / "code" / "mine.py").write_text("KEY = 'sk-1234567890abcdef'\ndef score(p, r): ...\n")
    with pytest.raises(
        InputError, match=r"code.path: mine.py contains the secret in the environment variable TEAM_API_KEY"
    ):
        load(tmp_path, content)


# --- permission ---


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"code": True}, "ppo.rewards.0 is a function"),
        ({"ppo": {"rewards": [{"kind": "function", "function": "json:loads"}]}}, "ppo.rewards.0 is a function"),
        (
            {"ppo": {"rewards": [{"kind": "exact_match"}, {"kind": "command", "command": ["x"]}]}},
            "ppo.rewards.1 is a command",
        ),
        ({"judge": {"kind": "command", "command": ["x"]}}, "judge is a command"),
    ],
)
def test_programs_of_the_user_need_permission_on_a_cluster(change: dict[str, Any], what: str, tmp_path: Path) -> None:
    content = verifiable_params(MODEL, tmp_path)
    content = (
        with_code(tmp_path, content)
        if change.pop("code", False)
        else content | {key: content[key] | value if key == "ppo" else value for key, value in change.items()}
    )
    params = load(tmp_path, content)
    with pytest.raises(InputError) as caught:
        check_params(params)
    assert str(caught.value).startswith(what) and "cluster.allow_user_code is false; set it to true" in str(
        caught.value
    )
    allowed = params.model_copy(update={"cluster": params.cluster.model_copy(update={"allow_user_code": True})})
    require_allowed_code(allowed)


def test_function_of_a_judge_needs_permission_too(tmp_path: Path) -> None:
    content = toy_params(MODEL, write_data(tmp_path)) | {"judge": {"kind": "function", "function": "json:loads"}}
    with pytest.raises(InputError, match="judge is a function, a program of yours"):
        require_allowed_code(load(tmp_path, content))
    require_allowed_code(load(tmp_path, content, "cluster.allow_user_code=true"))
    require_allowed_code(load_params(Path("pipelines/params/movie_reviews.yaml")))


def test_settings_of_import_code_hold_the_folder(tmp_path: Path) -> None:
    pipeline = CompiledPipeline(
        load(tmp_path, with_code(tmp_path, verifiable_params(MODEL, tmp_path))), tmp_path / "out"
    )
    settings = pipeline.tasks["import-code"]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    unpack_code(json.loads(settings)["code"]["archive"], tmp_path / "copy")
    assert (tmp_path / "copy" / "mine.py").is_file()
    for stage in ("judge", "ppo", "evaluation"):
        own = pipeline.tasks[stage]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
        assert json.loads(own)["code_digest"] == digest_of_code(tmp_path / "code")
