"""`sweep` on a cluster: a run for each point, one after the other if they are to share stages, or an Experiment of Katib."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kfp
import pytest
import yaml
from kubernetes.config import kube_config

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.text.errors import InputError
from components.rlhf.tracking.mlflow import start_tracking
from pipelines.__main__ import cli
from pipelines.cluster import sweep as cluster_sweep
from pipelines.cluster.evaluation import metric_lines
from pipelines.settings import load_params
from tests.support.kfp_api import KfpApi, serving

TINY = Path(__file__).resolve().parents[3] / "pipelines" / "params" / "tiny.yaml"
GRID = ("--grid", "ppo.kl_coef=0.02,0.05")


@pytest.fixture
def api() -> KfpApi:
    return KfpApi()


@pytest.fixture
def host(api: KfpApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server, and no kubectl and kfp contexts of this machine."""
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.chdir(tmp_path)
    with serving(api) as address:
        yield address


@pytest.fixture
def sweep(host: str) -> Callable[..., int]:
    def run(*arguments: str, params: Path = TINY) -> int:
        try:
            cli.main(["sweep", str(params), "--host", host, *arguments], standalone_mode=False)
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run


def test_every_point_is_a_run_with_the_prefix_and_its_name(api: KfpApi, sweep: Callable[..., int]) -> None:
    assert sweep(*GRID, "--name", "nightly", "--experiment", "mine") == 0
    names = [run["display_name"] for run in api.runs.values()]
    assert names == ["nightly 1-kl_coef-0.02", "nightly 2-kl_coef-0.05"]
    assert [experiment["display_name"] for experiment in api.experiments.values()] == ["mine"]
    specs = [yaml.safe_dump(version["pipeline_spec"]) for version in api.versions.values()]
    assert [
        bool(re.search(rf'"kl_coef": ?{value}', spec)) for value, spec in zip((0.02, 0.05), specs, strict=True)
    ] == [True, True]


def test_default_names_of_the_runs_have_a_common_prefix(api: KfpApi, sweep: Callable[..., int]) -> None:
    assert sweep(*GRID) == 0
    first, second = (run["display_name"].rpartition(" ")[0] for run in api.runs.values())
    assert first == second and first


@pytest.mark.parametrize(("states", "code"), [(["SUCCEEDED"], 0), (["FAILED", "SUCCEEDED"], 1)])
def test_with_wait_a_point_starts_when_the_one_before_has_ended(
    api: KfpApi, sweep: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    states: list[str], code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        cluster_sweep, "metric_lines", lambda params, run_id: [f"win_rate=0.{params.ppo.kl_coef * 100:.0f}"]
    )
    api.states = list(states)
    assert sweep(*GRID, "--wait") == code
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("point", "state", "win_rate"))]
    assert lines == [
        "point    1-kl_coef-0.02 (1 of 2)", f"state    {states[0].lower()}", *(["win_rate=0.2"] if code == 0 else []),
        "point    2-kl_coef-0.05 (2 of 2)", "state    succeeded", "win_rate=0.5",
    ]  # fmt: skip


def test_nothing_is_submitted_if_one_point_is_invalid(api: KfpApi, sweep: Callable[..., int]) -> None:
    with pytest.raises(InputError, match="point 2-require_digests-true: .*digest"):
        sweep("--grid", "cluster.require_digests=false,true")
    assert api.num_created == 0


def test_failed_submission_says_how_many_points_were_submitted(
    api: KfpApi, sweep: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = cluster_sweep.submit.submit

    def submit_one(params: Any, *arguments: Any) -> Any:
        if params.ppo.kl_coef == 0.05:
            raise InputError("the server is full")
        return submit(params, *arguments)

    monkeypatch.setattr(cluster_sweep.submit, "submit", submit_one)
    with pytest.raises(InputError, match=r"point 2-kl_coef-0.05, after 1 of 2 points: the server is full"):
        sweep(*GRID)
    assert len(api.runs) == 1


@pytest.mark.parametrize("argument", ["--out", "--resume", "--table"])
def test_options_of_local_sweeps_are_refused(api: KfpApi, sweep: Callable[..., int], argument: str) -> None:
    with pytest.raises(InputError, match="are for sweeps on this machine"):
        sweep(*GRID, argument, "folder")
    assert api.requests == []


def test_address_in_the_environment_submits_nothing(api: KfpApi, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep costs hours of many pods: only --host in the command asks for it."""
    monkeypatch.setenv("KF_PIPELINES_ENDPOINT", host)
    monkeypatch.setattr("pipelines.local.sweep.create_sweep", lambda points, folder: None)
    monkeypatch.setattr("pipelines.local.sweep.run_sweep", lambda folder, console: {})
    with pytest.raises(InputError, match="contains no sweep"):
        cli.main(["sweep", str(TINY), *GRID], standalone_mode=False)
    assert api.requests == []


def test_numbers_of_a_run_are_those_of_its_evaluation_in_mlflow(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    params = load_params(TINY, [f"tracking.uri={uri}"])
    for stage, number in (("ppo", 0.1), ("evaluation", 0.775)):
        tracker = start_tracking(TrackingConfig(uri=uri), run_id="r", stage=stage, params={})
        tracker.log({"final/win_rate": number, "final/kl": 2.5}, step=0)
        tracker.finish("FINISHED")
    assert list(metric_lines(params, "r")) == ["win_rate=0.775", "kl=2.5"]
    assert list(metric_lines(params, "another")) == []
    assert list(metric_lines(load_params(TINY, ["tracking.enabled=false"]), "r")) == []


def katib(tmp_path: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    file = tmp_path / "katib.yaml"
    command = ["sweep", str(TINY), "--katib", str(file), "--host", "http://ml-pipeline.kubeflow:8888", *arguments]
    cli.main(command, standalone_mode=False)
    config_map, experiment = yaml.safe_load_all(file.read_text())
    return config_map, experiment


IMAGE = ("--image", "registry/kfp-rlhf:1")


def test_katib_searches_the_grid_with_trials_that_submit_and_wait(tmp_path: Path) -> None:
    config_map, experiment = katib(
        tmp_path, *IMAGE, *GRID, "--grid", "seed=0,1,2", "--namespace", "team", "--name", "search"
    )
    assert config_map["metadata"] == experiment["metadata"] == {"name": "search", "namespace": "team"}
    spec = experiment["spec"]
    assert spec["parameters"] == [
        {"name": "ppo-kl_coef", "parameterType": "categorical", "feasibleSpace": {"list": ["0.02", "0.05"]}},
        {"name": "seed", "parameterType": "categorical", "feasibleSpace": {"list": ["0", "1", "2"]}},
    ]
    assert spec["objective"]["objectiveMetricName"] == "win_rate" and spec["objective"]["type"] == "maximize"
    assert (spec["algorithm"]["algorithmName"], spec["maxTrialCount"], spec["parallelTrialCount"]) == ("grid", 6, 1)
    template = spec["trialTemplate"]
    (container,) = template["trialSpec"]["spec"]["template"]["spec"]["containers"]
    assert container["name"] == template["primaryContainerName"]
    # Every parameter of the template has a value, and every value a place.
    named = {parameter["name"] for parameter in template["trialParameters"]}
    assert set(re.findall(r"\$\{trialParameters\.([^}]+)\}", " ".join(container["command"]))) == named
    references = {parameter["reference"] for parameter in template["trialParameters"]}
    assert references == {parameter["name"] for parameter in spec["parameters"]} | {"${trialSpec.Name}"}


def test_command_of_a_trial_is_one_that_submit_accepts(
    tmp_path: Path, api: KfpApi, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command in the manifest, with the values of a trial, the mounted files, and the address of the test's server."""
    config_map, experiment = katib(tmp_path, *IMAGE, *GRID)
    (container,) = experiment["spec"]["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]["containers"]
    (tmp_path / "params.yaml").write_text(config_map["data"]["params.yaml"])
    (tmp_path / "token").write_text("t")
    values = {
        "${trialParameters.trial}": "search-x1", "${trialParameters.ppo-kl_coef}": "0.05", "/sweep/": f"{tmp_path}/",
        "/var/run/secrets/kubeflow/pipelines/": f"{tmp_path}/", "http://ml-pipeline.kubeflow:8888": host,
    }  # fmt: skip
    command = container["command"]
    for key, value in values.items():
        command = [argument.replace(key, value) for argument in command]
    assert command.pop(0) == "kfp-rlhf"
    with pytest.raises(SystemExit) as end:
        cli.main(command, standalone_mode=False)
    assert end.value.code == 0
    ((run),) = api.runs.values()
    assert run["display_name"] == "search-x1"
    ((version),) = api.versions.values()
    assert re.search('"kl_coef": ?0.05', yaml.safe_dump(version["pipeline_spec"]))


def test_katib_draws_from_ranges_by_their_distribution(tmp_path: Path) -> None:
    ranges = ("--range", "ppo.kl_coef=0.001..0.1:log", "--range", "seed=0..9")
    _, experiment = katib(tmp_path, *IMAGE, "--random", "5", *ranges)
    spec = experiment["spec"]
    assert (spec["algorithm"]["algorithmName"], spec["maxTrialCount"]) == ("random", 5)
    assert spec["parameters"] == [
        {
            "name": "ppo-kl_coef", "parameterType": "double",
            "feasibleSpace": {"min": "0.001", "max": "0.1", "distribution": "logUniform"},
        },
        {"name": "seed", "parameterType": "int", "feasibleSpace": {"min": "0", "max": "9", "distribution": "uniform"}},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (GRID, "--katib needs --image"),
        ((*IMAGE, *GRID, "--name", "My Sweep"), "is not a name in Kubernetes"),
        ((*IMAGE, "--grid", "ppo.kl_coeff=1,2"), "did you mean"),
        ((*IMAGE, *GRID, "--set", "data.prompts.path=/here.jsonl"), "which the pods of Katib do not have"),
        ((*IMAGE, *GRID, "--set", "storage.publish_uri=/tmp/x"), "a folder that pods do not have"),
        ((*IMAGE, *GRID, "--out", "x"), "are for sweeps on this machine"),
    ],
)
def test_manifest_that_could_not_work_is_not_written(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        katib(tmp_path, *arguments)
    assert not (tmp_path / "katib.yaml").exists()
