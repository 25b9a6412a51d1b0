"""Files of checks are copied into the params; the pods of checks get the keys and the network that they need; edges of the DAG."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.rlhf.config.checks import PromptsCheck
from components.rlhf.config.params import Params
from components.rlhf.text.errors import InputError
from pipelines.access import secrets_of
from pipelines.check_files import prompts_in
from pipelines.compile import compile_pipeline
from pipelines.placement import egress_of
from pipelines.preflight import check_packages
from pipelines.settings import checks_settings, load_params
from tests.pipelines.test_dag import edges, settings_in, stages_of

DATA: dict[str, Any] = {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "preferences", "prompts")}
ENDPOINT = {"url": "https://api.example.com/v1", "model": "gpt", "rubric_file": "rubric.txt"}
FROM_FILE = {"kind": "prompts", "prompts_file": "set.txt", "endpoint": ENDPOINT, "max_increase": 0.5}
TASKS = {"kind": "lm_eval", "tasks": ["facts"], "include_path": "tasks", "max_drop": 0.1}


def load(folder: Path, *checks: dict[str, Any], **sections: Any) -> Params:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"data": DATA, "gate": {"checks": list(checks)}, **sections}), encoding="utf-8")
    return load_params(path)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "set.txt").write_text("How?\n\n  Why?  \n")
    (tmp_path / "rubric.txt").write_text("10: kind.")
    (tmp_path / "mycode" / "tasks").mkdir(parents=True)
    (tmp_path / "mycode" / "tasks" / "facts.yaml").write_text("task: facts")
    return tmp_path


def test_texts_replace_files(files: Path) -> None:
    params = load(files, FROM_FILE)
    (check,) = params.gate.checks
    assert isinstance(check, PromptsCheck) and check.endpoint is not None
    assert (check.prompts, check.prompts_file) == (("How?", "Why?"), None)
    assert (check.endpoint.rubric, check.endpoint.rubric_file) == ("10: kind.", None)
    assert "set.txt" not in checks_settings(params, "ppo")


def test_prompts_of_a_file() -> None:
    assert prompts_in('{"prompt": "a\\nb", "id": 1}\n\n{"prompt": "c"}\n', "x.jsonl", "key") == ["a\nb", "c"]
    assert prompts_in('{"prompt": "a"}\n', "x.txt", "key") == ['{"prompt": "a"}']


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"question": "a"}', '{"prompt": ""}', '{"prompt": 1}'])
def test_line_without_a_prompt_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"key: x.jsonl:2 "):
        prompts_in(f'{{"prompt": "a"}}\n{text}\n', "x.jsonl", "key")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts_file": "none.txt"}, "gate.checks.0.prompts_file: none.txt is not a file next to the params file"),
        ({"endpoint": ENDPOINT | {"rubric_file": "none.txt"}}, "gate.checks.0.endpoint.rubric_file: none.txt is not a file"),
        ({"min_rate": 0.9}, "which no policy can keep: with 2 prompts"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_files_is_said_before_the_run(files: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        load(files, FROM_FILE | change)


def test_tasks_travel_in_the_folder_of_code(files: Path) -> None:
    code = {"path": "mycode"}
    assert load(files, TASKS, code=code).code.archive
    for path in ("nowhere", "..", "tasks/../.."):
        with pytest.raises(InputError, match=r"include_path: .* is not a folder in code\.path"):
            load(files, TASKS | {"include_path": path}, code=code)


def test_missing_harness_is_said_before_a_local_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.preflight.find_spec", lambda name: None)
    check_packages(load(files, FROM_FILE))
    with pytest.raises(InputError, match="lm-evaluation-harness is not installed here; install the extra evals"):
        check_packages(load(files, TASKS, code={"path": "mycode"}))


@pytest.mark.slow
def test_unknown_task_is_said_before_a_local_run(files: Path) -> None:
    pytest.importorskip("lm_eval")
    named = {key: value for key, value in TASKS.items() if key != "include_path"}
    check_packages(load(files, named | {"tasks": ["arc_easy"]}))
    with pytest.raises(InputError, match=r"gate\.checks\.0\.tasks: .* no task arc_easyy; did you mean arc_easy\?"):
        check_packages(load(files, named | {"tasks": ["arc_easy", "arc_easyy"]}))


def test_pods_of_checks_reach_the_endpoint_with_its_key(files: Path) -> None:
    params = load(files, FROM_FILE)
    assert egress_of("checks", params, []) == {"kfp-rlhf/egress": "endpoint"}
    assert egress_of("evaluation", params, []) == {}
    keys = [dict(secret.variables) for secret in secrets_of("checks", params, []) if secret.name == "rlhf-judge"]
    assert keys == [{"OPENAI_API_KEY": "OPENAI_API_KEY"}]


@pytest.mark.parametrize("method", ["ppo", "both"])
def test_evaluation_waits_for_the_checks_of_its_policy(files: Path, method: str) -> None:
    params = load(files, FROM_FILE, policy={"method": method})
    spec = next(yaml.safe_load_all(compile_pipeline(params, files / "pipeline.yaml").read_text()))
    dag = stages_of(spec)
    tasks = {"checks": ("ppo", "evaluation")} | ({"checks-2": ("dpo", "evaluation-2")} if method == "both" else {})
    for task, (policy, evaluation) in tasks.items():
        assert edges(dag)[task] == {"prepare-data", "sft", policy} and task in edges(dag)[evaluation]
        assert settings_in(dag, task)["method"] == policy
        assert settings_in(dag, evaluation)["check_names"] == ["prompts"]
    names = [settings_in(dag, task)["stage_name"] for task in tasks]
    assert names == (["checks"] if method == "ppo" else ["ppo_checks", "checks"])
    # The texts are in the settings of checks and nowhere else among the stages.
    assert [task for task in dag["tasks"] if "How?" in json.dumps(dag["tasks"][task])] == list(tasks)


def test_run_without_checks_has_no_task(files: Path) -> None:
    spec = next(yaml.safe_load_all(compile_pipeline(load(files), files / "pipeline.yaml").read_text()))
    assert "checks" not in stages_of(spec)["tasks"]
