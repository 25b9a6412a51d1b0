"""Tasks, edges and settings of the compiled pipeline; every reference in it resolves."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from components.rlhf.config.params import Params
from pipelines.compile import ROOT, compile_component, compile_pipeline, stage_names
from pipelines.settings import load_params

MOVIES = ROOT / "pipelines" / "params" / "movie_reviews.yaml"


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    target = tmp_path_factory.mktemp("compiled") / "pipeline.yaml"
    return next(yaml.safe_load_all(compile_pipeline(load_params(MOVIES), target).read_text()))


def stages_of(spec: dict[str, Any]) -> dict[str, Any]:
    """The DAG of the stages, inside the exit handler."""
    (name,) = (
        task["componentRef"]["name"]
        for task in spec["root"]["dag"]["tasks"].values()
        if task["taskInfo"]["name"] == "run"
    )
    return spec["components"][name]["dag"]


def edges(dag: dict[str, Any]) -> dict[str, set[str]]:
    """The upstream tasks of each task."""
    upstream = {}
    for name, task in dag["tasks"].items():
        inputs = task.get("inputs", {})
        values = [*inputs.get("parameters", {}).values(), *inputs.get("artifacts", {}).values()]
        producers = (v.get("taskOutputArtifact") or v.get("taskOutputParameter") for v in values)
        upstream[name] = {producer["producerTask"] for producer in producers if producer}
    return upstream


def test_tasks_and_edges(spec: dict[str, Any]) -> None:
    assert edges(stages_of(spec)) == {
        "import-model": set(),
        "prepare-data": {"import-model"},
        "sft": {"import-model", "prepare-data"},
        "reward-model": {"import-model", "prepare-data", "sft"},
        "judge": {"import-model", "prepare-data"},
        "ppo": {"prepare-data", "sft", "reward-model"},
        "evaluation": {"prepare-data", "sft", "reward-model", "judge", "ppo"},
        "gate": {"ppo", "evaluation"},
    }


DPO_EDGES = {
    "import-model": set(),
    "prepare-data": {"import-model"},
    "sft": {"import-model", "prepare-data"},
    "judge": {"import-model", "prepare-data"},
    "dpo": {"prepare-data", "sft"},
    "evaluation": {"prepare-data", "sft", "judge", "dpo"},
    "gate": {"dpo", "evaluation"},
}
BOTH_EDGES = {
    **DPO_EDGES,
    "reward-model": {"import-model", "prepare-data", "sft"},
    "ppo": {"prepare-data", "sft", "reward-model"},
    "evaluation": {"prepare-data", "sft", "reward-model", "judge", "ppo"},
    "evaluation-2": {"prepare-data", "sft", "reward-model", "judge", "dpo", "evaluation"},
    "better": {"ppo", "dpo", "evaluation", "evaluation-2"},
}
del BOTH_EDGES["gate"]


@pytest.fixture(scope="module", params=["dpo", "both"])
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def other(method: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The pipeline of a run with DPO, or with PPO and DPO."""
    target = tmp_path_factory.mktemp(method) / "pipeline.yaml"
    params = load_params(MOVIES, [f"policy.method={method}"])
    return next(yaml.safe_load_all(compile_pipeline(params, target).read_text()))


def settings_in(dag: dict[str, Any], task: str) -> dict[str, Any]:
    constant = dag["tasks"][task]["inputs"]["parameters"]["settings"]["runtimeValue"]["constant"]
    return dict(json.loads(constant))


def test_tasks_and_edges_of_a_run_with_dpo(other: dict[str, Any], method: str) -> None:
    dag = stages_of(other)
    assert edges(dag) == (DPO_EDGES if method == "dpo" else BOTH_EDGES)
    tasks = dag["tasks"]
    assert "judge" in tasks["dpo"]["dependentTasks"]  # as PPO: what is wrong with it is known first
    artifacts = tasks["dpo"]["inputs"]["artifacts"]
    assert artifacts["preferences"]["taskOutputArtifact"]["outputArtifactKey"] == "preferences"
    json_format.ParseDict(other, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)


def test_each_policy_has_an_evaluation_that_knows_its_method(other: dict[str, Any], method: str) -> None:
    dag = stages_of(other)
    tasks = {"dpo": {"evaluation": "dpo"}, "both": {"evaluation": "ppo", "evaluation-2": "dpo"}}[method]
    found = {task: settings_in(dag, task)["method"] for task in tasks}
    assert found == tasks
    for task, name in tasks.items():
        policy = dag["tasks"][task]["inputs"]["artifacts"]["policy"]["taskOutputArtifact"]
        assert policy == {"outputArtifactKey": "model", "producerTask": name}
    names = [settings_in(dag, task)["stage_name"] for task in tasks]
    assert names == (["evaluation"] if method == "dpo" else ["ppo_evaluation", "evaluation"])
    # Only the method differs, so that both sample alike.
    settings = [{k: v for k, v in settings_in(dag, t).items() if k not in ("method", "stage_name")} for t in tasks]
    assert settings[0] == settings[-1]


def test_gate_of_two_policies_takes_one(other: dict[str, Any], method: str) -> None:
    """Every path to a register task has a condition on the method and one on that method's own decision."""
    if method == "dpo":
        test_gate_branches_on_its_input_parameter(other)
        return
    dag = stages_of(other)
    inputs = dag["tasks"]["better"]["inputs"]
    better = inputs["parameters"]["better"]["taskOutputParameter"]
    assert better == {"outputParameterKey": "better", "producerTask": "evaluation-2"}
    branches = other["components"][dag["tasks"]["better"]["componentRef"]["name"]]["dag"]["tasks"]
    assert {task["triggerPolicy"]["condition"].rpartition("==")[2].strip() for task in branches.values()} == {
        "'ppo'",
        "'dpo'",
    }
    for name, evaluation in (("ppo", "evaluation"), ("dpo", "evaluation-2")):
        decision = inputs["parameters"][f"{name}_decision"]["taskOutputParameter"]
        assert decision == {"outputParameterKey": "decision", "producerTask": evaluation}
        verdict = inputs["artifacts"][f"{name}_verdict"]["taskOutputArtifact"]
        assert verdict == {"outputArtifactKey": "evaluation", "producerTask": evaluation}
        assert inputs["artifacts"][f"{name}_policy"]["taskOutputArtifact"]["producerTask"] == name
        (branch,) = (task for task in branches.values() if f"'{name}'" in task["triggerPolicy"]["condition"])
        inner = other["components"][branch["componentRef"]["name"]]["dag"]["tasks"]
        (gate,) = inner.values()
        passed = gate["inputs"]["parameters"]["decision"]["componentInputParameter"]
        assert passed.endswith(f"{name}_decision")
        for artifact in ("policy", "verdict"):
            assert gate["inputs"]["artifacts"][artifact]["componentInputArtifact"].endswith(f"{name}_{artifact}")


def test_ppo_and_the_judge_never_see_the_same_data(spec: dict[str, Any], other: dict[str, Any]) -> None:
    """The judge's preferences and the held-out prompts are not inputs of a stage that trains."""
    tasks = stages_of(other)["tasks"] | stages_of(spec)["tasks"]

    def datasets_of(task: str) -> set[str]:
        artifacts = tasks[task]["inputs"].get("artifacts", {}).values()
        outputs = (a["taskOutputArtifact"] for a in artifacts)
        return {o["outputArtifactKey"] for o in outputs if o["producerTask"] == "prepare-data"}

    assert {task: datasets_of(task) for task in ("sft", "reward-model", "judge", "ppo", "dpo", "evaluation")} == {
        "sft": {"demonstrations"},
        "reward-model": {"preferences", "prompts"},
        "judge": {"judge_preferences"},
        "ppo": {"prompts"},
        "dpo": {"preferences"},
        "evaluation": {"heldout_prompts"},
    }


def test_notify_runs_last_even_if_the_run_fails(spec: dict[str, Any]) -> None:
    task = spec["root"]["dag"]["tasks"]["notify"]
    assert task["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert task["dependentTasks"] == ["exit-handler-1"]
    assert task["inputs"]["parameters"]["status"] == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}


def test_gate_branches_on_its_input_parameter(spec: dict[str, Any]) -> None:
    conditions = {
        task["triggerPolicy"]["condition"]
        for component in spec["components"].values()
        for task in component.get("dag", {}).get("tasks", {}).values()
        if "triggerPolicy" in task
    }
    assert len(conditions) == 2
    assert all("inputs.parameter_values['pipelinechannel--decision']" in condition for condition in conditions)


def test_spec_parses_strictly(spec: dict[str, Any]) -> None:
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec(), ignore_unknown_fields=False)


def test_every_reference_resolves(spec: dict[str, Any]) -> None:
    executors = spec["deploymentSpec"]["executors"]
    used = {component["executorLabel"] for component in spec["components"].values() if "executorLabel" in component}
    assert used == set(executors)
    dags = [spec["root"]["dag"], *(c["dag"] for c in spec["components"].values() if "dag" in c)]
    for dag in dags:
        for task in dag["tasks"].values():
            assert task["componentRef"]["name"] in spec["components"]
            assert set(task.get("dependentTasks", [])) <= set(dag["tasks"])


def test_executors_run_the_stage_modules(spec: dict[str, Any]) -> None:
    for executor in spec["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["command"][:2] == ["python", "-m"]
        assert (ROOT / Path(*container["command"][2].split(".")) / "__main__.py").is_file()
        if container["command"][2] != "components.notify":  # which has no outputs
            assert container["args"][-2:] == ["--executor-input", "{{$}}"]


def test_settings_are_string_parameters(spec: dict[str, Any]) -> None:
    """KFP converts the integers of a struct to floats, so no settings are a struct."""
    for component in spec["components"].values():
        for name, parameter in component.get("inputDefinitions", {}).get("parameters", {}).items():
            kind = "TASK_FINAL_STATUS" if name == "status" else "STRING"
            assert parameter["parameterType"] == kind


def test_run_id_comes_from_the_pod_label(tmp_path: Path) -> None:
    target = compile_pipeline(load_params(MOVIES), tmp_path / "pipeline.yaml")
    _, platform = yaml.safe_load_all(target.read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == 10  # register is in both branches
    for executor in executors.values():
        assert executor["fieldPathAsEnv"][:1] == [
            {"fieldPath": "metadata.labels['pipeline/runid']", "name": "RLHF_RUN_ID"}
        ]


def test_user_models_replace_stages(tmp_path: Path) -> None:
    params: Params = load_params(MOVIES, ["sft.use=/models/sft", "reward_model.use=/models/rm"])
    dag = stages_of(next(yaml.safe_load_all(compile_pipeline(params, tmp_path / "p.yaml").read_text())))
    assert "sft" not in dag["tasks"]
    # An imported reward model is measured by the stage that otherwise trains one.
    assert edges(dag)["reward-model"] == {"prepare-data", "import-sft-model", "import-reward-model"}
    assert edges(dag)["ppo"] == {"prepare-data", "import-sft-model", "reward-model"}


@pytest.mark.parametrize("stage", stage_names())
def test_component_yaml_is_up_to_date(stage: str, tmp_path: Path) -> None:
    compile_component(stage, tmp_path / "component.yaml")
    committed = ROOT / "components" / stage / "component.yaml"
    assert committed.read_text() == (tmp_path / "component.yaml").read_text(), "run make compile"
