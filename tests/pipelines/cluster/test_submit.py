"""`submit` with kfp's client, against a server that implements the published API."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import kfp
import pytest
import yaml
from kubernetes.config import kube_config

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.cluster.server import ServerAccess, connect
from pipelines.cluster.submit import SubmitOptions, check_cron, wait
from pipelines.cluster.versions import differences
from tests.support.kfp_api import HttpError, KfpApi, serving
from tests.support.toy_pipeline import toy_params, write_data, write_params

ROOT = Path(__file__).resolve().parents[3]
TINY = "pipelines/params/tiny.yaml"


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


Submit = Callable[..., Result]


@pytest.fixture
def api() -> KfpApi:
    return KfpApi()


@pytest.fixture
def host(api: KfpApi) -> Iterator[str]:
    with serving(api) as address:
        yield address


@pytest.fixture
def submit(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """Runs the command, isolated from the kubectl and kfp contexts of this machine."""
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.chdir(ROOT)

    def run(*arguments: str, params: str = TINY, **environment: str) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                cli.main(["submit", params, "--host", host, *arguments], standalone_mode=False)
                code, error = 0, ""
            except SystemExit as end:
                code, error = int(end.code or 0), ""
            except InputError as problem:  # as printed by main()
                code, error = 1, f"error: {problem}\n"
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err + error)

    return run


def error_of(result: Result) -> str:
    """The one-line error message of a failed command."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_submit_starts_a_run_of_a_named_version(api: KfpApi, host: str, submit: Submit) -> None:
    result = submit("--experiment", "mine", "--name", "first", "--set", "tracking.uri=http://mlflow:5000")
    assert result.returncode == 0, result.stderr
    ((run_id, run),) = api.runs.items()
    (version,) = api.versions.values()
    (experiment,) = api.experiments.values()
    assert re.fullmatch(r"rlhf-0\.1\.0-[0-9a-f]{12}(-dirty)?-[0-9a-f]{8}", version["display_name"])
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["display_name"] == "first" and run["service_account"] == "rlhf-runner"
    assert experiment["display_name"] == "mine" and run["experiment_id"] == experiment["experiment_id"]
    assert f"{host}/#/runs/details/{run_id}" in result.stdout
    assert f"pods     kubectl -n kubeflow get pods -l pipeline/runid={run_id}\n" in result.stdout
    assert f"http://mlflow:5000/#/experiments: experiment kfp-rlhf, tags.`rlhf.run_id` = '{run_id}'" in result.stdout
    assert version["display_name"] in result.stdout


def test_same_content_reuses_the_version_and_dry_run_shows_differences(api: KfpApi, submit: Submit) -> None:
    first = submit("--dry-run")
    assert "the first version of the pipeline rlhf" in first.stdout and api.num_created == 0
    assert submit().returncode == 0
    recurring = submit("--recurring", "0 0 3 * * *")
    assert recurring.returncode == 0, recurring.stderr
    assert len(api.versions) == 1 and len(api.runs) == 1
    (schedule,) = api.recurring_runs.values()
    (version,) = api.versions.values()
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert (schedule["max_concurrency"], schedule["no_catchup"], schedule["mode"]) == ("1", True, "ENABLE")
    assert schedule["service_account"] == "rlhf-runner"
    num_created = api.num_created
    assert f"no difference from {version['display_name']}" in submit("--dry-run").stdout
    changed = submit(
        "--dry-run", "--set", "ppo.kl_coef=0.1", "--set", "cluster.stages={sft: cpu-large, ppo: cpu-large}"
    )
    assert [line for line in changed.stdout.splitlines() if line[:2] in ("~ ", "+ ", "- ")] == [
        '~ ppo, sft: container.resources.resourceCpuLimit: "1" -> "8"',
        '~ ppo, sft: container.resources.resourceCpuRequest: "1" -> "8"',
        '~ ppo, sft: container.resources.resourceMemoryLimit: "4Gi" -> "64Gi"',
        '~ ppo, sft: container.resources.resourceMemoryRequest: "4Gi" -> "64Gi"',
        "~ ppo: settings.ppo.kl_coef: 0.05 -> 0.1",
    ]
    gpus = submit("--dry-run", "--set", "cluster.stages={ppo: gpu-24gb}").stdout
    assert '+ run parameter tolerations_gpu_24gb[0].key: "nvidia.com/gpu"' in gpus
    assert "+ ppo: nodeSelector.nodeSelectorJson" in gpus
    assert ".pipelinechannel--" not in gpus  # a value passed between DAGs
    assert api.num_created == num_created


@pytest.mark.parametrize(("method", "tasks"), [("dpo", {"dpo"}), ("both", {"ppo", "dpo"})])
def test_method_of_the_policy_is_submitted(api: KfpApi, submit: Submit, method: str, tasks: set[str]) -> None:
    result = submit("--set", f"policy.method={method}")
    assert result.returncode == 0, result.stderr
    assert len(api.runs) == 1
    changed = submit("--dry-run", "--set", f"policy.method={method}", "--set", "dpo.beta=0.3").stdout
    lines = [line for line in changed.splitlines() if line[:2] in ("~ ", "+ ", "- ")]
    assert lines == ["~ dpo: settings.dpo.beta: null -> 0.3"]
    removed = submit("--dry-run", "--set", "policy.method=ppo").stdout
    assert ("+ ppo" in removed) == (method == "dpo") and "- dpo" in removed


def test_dpo_without_its_data_is_refused_before_the_first_request(api: KfpApi, submit: Submit) -> None:
    error = error_of(submit("--set", "policy.method=both", "--set", "dpo.loss=kto"))
    assert "dpo.loss is kto, which learns from single answers labeled as desirable or not" in error
    assert api.num_created == 0


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["SUCCEEDED"], 0),
        (["FAILED"], 1),
        pytest.param(["RUNNING", "FAILED"], 1, marks=pytest.mark.slow),
        (["CANCELED"], 1),
    ],
)
def test_exit_code_of_wait_follows_the_state_of_the_run(
    api: KfpApi, submit: Submit, states: list[str], code: int
) -> None:
    api.states = states
    api.num_failing_polls = 0
    result = submit("--wait")
    assert result.returncode == code, result.stderr
    assert f"state    {states[-1].lower()}" in result.stdout
    assert ("Workflow failed: task ppo" in result.stdout) == (states[-1] == "FAILED")


def test_wait_tolerates_an_outage_of_the_server(api: KfpApi, host: str) -> None:
    access = ServerAccess(host)
    server = connect(access)
    api.runs["r"] = {"run_id": "r"}
    api.states, api.num_failing_polls = ["SUCCEEDED"], 3
    lines: list[str] = []
    assert wait(server, access, "r", SubmitOptions("x", poll_seconds=0.01), lines.append) == 0
    assert lines == ["state    succeeded"] and api.num_failing_polls == 0
    with pytest.raises(InputError, match=r"returned error 404: Run gone not found"):
        wait(server, access, "gone", SubmitOptions("x", poll_seconds=0.01), lines.append)


# --- credentials and namespaces


def test_token_and_namespace_on_a_multi_user_server(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    api.token, api.multi_user, api.namespaces_with_rights = "s3cret", True, {"team"}
    assert "rejected the credentials (401)" in error_of(submit("--namespace", "team"))
    (tmp_path / "token").write_text("s3cret\n")
    token = ("--token-file", str(tmp_path / "token"))
    assert "is a multi-user server; pass your profile namespace with --namespace" in error_of(submit(*token))
    assert "denies access to namespace other (403)" in error_of(submit(*token, "--namespace", "other"))
    assert api.num_created == 0
    result = submit(*token, "--namespace", "team")
    assert result.returncode == 0, result.stderr
    assert [e["namespace"] for e in api.experiments.values()] == ["team"]
    assert [p["namespace"] for p in api.pipelines.values()] == ["team"]
    assert submit("--namespace", "team", KFP_TOKEN="s3cret").returncode == 0
    assert "s3cret" not in result.stdout + result.stderr


def test_session_cookies(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    api.cookie = "authservice_session=abc"
    assert "(401)" in error_of(submit())
    assert submit(KFP_COOKIES="authservice_session=abc").returncode == 0
    (tmp_path / "empty").write_text("\n")
    assert "is empty; write the secret into it" in error_of(submit("--cookies-file", str(tmp_path / "empty")))


def test_namespace_is_not_sent_to_a_single_user_server(api: KfpApi, submit: Submit) -> None:
    result = submit("--namespace", "kubeflow")
    assert result.returncode == 0, result.stderr
    assert [e.get("namespace", "") for e in api.experiments.values()] == [""]


# --- unreachable, wrong and old servers


def test_unreachable_server_fails_within_seconds(tmp_path: Path) -> None:
    """The whole command, in a separate process."""
    command = [sys.executable, "-m", "pipelines", "submit", TINY, "--host", "http://127.0.0.1:9"]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - started < 30  # mostly imports, on a busy machine
    assert "http://127.0.0.1:9 cannot be reached" in error_of(Result(result.returncode, result.stdout, result.stderr))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "--host 127.0.0.1:9 is not a URL; write http(s)://HOST[:PORT]."),
        ("https://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_invalid_host_is_rejected(address: str, message: str, submit: Submit) -> None:
    assert message in error_of(submit("--host", address))


def test_https_to_a_plain_http_server_is_rejected(host: str, submit: Submit) -> None:
    assert "cannot be reached" in error_of(submit("--host", host.replace("http:", "https:")))


@pytest.mark.parametrize(
    ("version", "store", "message"),
    [
        ("2.15.2", "database", "runs Kubeflow Pipelines 2.15.2, but this pipeline needs 2.16 or newer"),
        ("v1.8.22", None, "runs Kubeflow Pipelines v1.8.22, but"),
        ("unknown", None, "runs Kubeflow Pipelines older than 2.14, but"),
    ],
)
def test_old_server_is_rejected(api: KfpApi, submit: Submit, version: str, store: str | None, message: str) -> None:
    api.version, api.pipeline_store = version, store
    assert message in error_of(submit())
    assert api.num_created == 0


@pytest.mark.parametrize("version", ["2.16.0", "3.0.1", "unknown", None])
def test_new_servers_and_builds_without_a_version_are_accepted(
    api: KfpApi, submit: Submit, version: str | None
) -> None:
    api.version = version
    assert submit("--dry-run").returncode == 0


def test_server_behind_the_ui(api: KfpApi, submit: Submit) -> None:
    """The gateway of the Kubeflow platform and the port-forward of the README lead to the UI."""
    api.behind_ui = True
    result = submit()
    assert result.returncode == 0, result.stderr
    api.version = "2.15.2"
    assert "runs Kubeflow Pipelines 2.15.2, but" in error_of(submit())
    api.version, api.pipeline_store = None, None
    assert "runs Kubeflow Pipelines older than 2.14, but" in error_of(submit())
    api.pipeline_store, api.multi_user = "kubernetes", True
    assert "is a multi-user server; pass your profile namespace with --namespace" in error_of(submit())
    api.ready = False
    assert "is the Kubeflow Pipelines UI, and the API behind it does not respond" in error_of(submit())


class LoginGateway:
    """A gateway that responds with a login page, on every path or (as many do) on all but healthz."""

    def __init__(self, page: Any, *, health_is_open: bool) -> None:
        self.page, self.api = page, KfpApi() if health_is_open else None

    def handle(self, method: str, url: str, headers: Any, body: bytes) -> Any:
        if self.api and "healthz" in url:
            return self.api.handle(method, url, headers, body)
        if isinstance(self.page, Exception):
            raise self.page
        return self.page


@pytest.mark.parametrize("health_is_open", [False, True])
@pytest.mark.parametrize(
    ("page", "received"),
    [(b"<html>Log in</html>", "other content"), (HttpError(302, "to /dex/auth"), "a redirect (302)")],
)
def test_login_page_is_reported(submit: Submit, page: Any, received: str, health_is_open: bool) -> None:
    with serving(LoginGateway(page, health_is_open=health_is_open)) as address:
        error = error_of(submit("--host", address))
    assert f"expected JSON from the KFP API, got {received}" in error and "--cookies-file" in error


def test_other_servers_are_rejected(submit: Submit) -> None:
    class NotFoundServer:
        def handle(self, *_: Any) -> bytes:
            raise HttpError(404, "no such page")

    class ListServer:
        def handle(self, *_: Any) -> bytes:
            return b"[1, 2]"

    with serving(NotFoundServer()) as address:
        assert "is not a Kubeflow Pipelines 2 server" in error_of(submit("--host", address))
    with serving(ListServer()) as address:
        assert "expected JSON" in error_of(submit("--host", address))


def test_expired_token_creates_nothing(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("yesterday's")
    api.token = "today's"
    error = error_of(submit("--token-file", str(tmp_path / "token")))
    assert "(401); pass a token that has not expired with --token-file or KFP_TOKEN" in error
    assert "yesterday" not in error and api.num_created == 0
    error = error_of(submit("--token-file", str(tmp_path / "none")))
    assert "none cannot be read (No such file or directory); write the secret into it." in error


def test_error_message_of_the_server_is_shown(api: KfpApi, submit: Submit) -> None:
    def fail(*_: Any) -> None:
        raise HttpError(500, "database is read-only")

    api.create_run = fail  # type: ignore[method-assign, assignment]
    assert "returned error 500: database is read-only" in error_of(submit())


# --- local data


@pytest.fixture
def local(tmp_path: Path, tiny_model: Path) -> str:
    """Params with model and data on this machine."""
    return str(write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path))))


def test_local_data_requires_a_storage_uri(api: KfpApi, submit: Submit, local: str) -> None:
    assert "which a cluster cannot read; set storage.uri to s3://BUCKET/PREFIX" in error_of(submit(params=local))
    assert "a folder that a cluster cannot read" in error_of(submit("--set", "storage.uri=/somewhere", params=local))
    assert api.num_created == 0


def test_local_data_is_uploaded_under_its_digest(
    api: KfpApi, submit: Submit, local: str, tmp_path: Path, tiny_model: Path
) -> None:
    store = tmp_path / "shared"
    storage = ("--set", f"storage.uri={store}", "--set", f"cluster.claims={{{store}: shared}}")
    planned = submit("--dry-run", *storage, params=local)
    assert planned.stdout.count("unless it exists") == 3 + len(list(tiny_model.iterdir())) and not store.exists()
    result = submit(*storage, params=local)
    assert result.returncode == 0, result.stderr
    (version,) = api.versions.values()
    spec = json.dumps(version["pipeline_spec"])
    uploads = sorted(set(re.findall(rf"{store}/uploads/sha256-[0-9a-f]{{64}}[^\\\"]*", spec)))
    assert len(uploads) == 4 and str(tiny_model) not in spec
    for path in map(Path, uploads):
        original = tiny_model if path.is_dir() else tmp_path / path.name
        names = [p.name for p in original.iterdir()] if path.is_dir() else [""]
        assert all((path / name).read_bytes() == (original / name).read_bytes() for name in names)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    second = submit(*storage, params=local)
    assert "uploading" not in second.stdout and len(api.versions) == 1
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_invalid_local_data_is_found_before_the_first_request(
    api: KfpApi, submit: Submit, local: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": ')
    assert "prompts.jsonl:1 is not JSON" in error_of(submit(params=local))
    (tmp_path / "prompts.jsonl").unlink()
    assert "prompts.jsonl does not exist" in error_of(submit(params=local))
    assert api.requests == []


# --- parameters that cannot work on a cluster


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["storage.checkpoint_uri=/home/me/checkpoints"],
            "a folder that pods do not have; set it to s3://BUCKET/PREFIX, or to null",
        ),
        (
            ["storage.checkpoint_uri=/checkpoints/x"],
            "cluster.checkpoint_claim and cluster.checkpoint_volume are null; set one of them",
        ),
        (
            ["cluster.checkpoint_claim=shared", "cluster.checkpoint_volume={storage_class: fast}"],
            "checkpoint_claim and checkpoint_volume are both set; remove one of them",
        ),
        (
            ["storage.publish_uri=/home/me/models"],
            "storage.publish_uri is /home/me/models, a folder that pods do not have",
        ),
        (
            ["storage.answers_uri=/home/me/answers"],
            "storage.answers_uri is /home/me/answers, a folder that pods do not have; set it to s3://BUCKET/PREFIX.",
        ),
        (
            ["judge.kind=gpt"],
            "kind is not one of linear, reward_model, endpoint, function, exact_match, regex, numeric, json_schema, command; correct it.",
        ),
        (["judge.kind=reward_model", "judge.use=/home/me/none"], "judge.use: /home/me/none is not a folder"),
        (["judge=[{kind: reward_model, use: ./none}]"], "judge.0.use: none is not a folder"),
        (["tracking.uri=sqlite:////home/me/mlflow.db"], "which is on this machine; set it to the http(s) address"),
        (["cluster.require_digests=true"], "cluster.images.rollout is kfp-rlhf/rollout:0.1.0, which has no digest"),
        (["cluster.stages={ppo: gpu-80g}"], "did you mean gpu-80gb?"),
        (["ppo.kl_coeff=1"], "did you mean ppo.kl_coef?"),
    ],
)
def test_parameters_that_cannot_work_on_a_cluster(
    api: KfpApi, submit: Submit, overrides: list[str], message: str
) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    assert message in error_of(submit(*arguments))
    assert api.requests == []


@pytest.mark.parametrize("cron", ["0 3 * * *", "every night", "", "0 0 3 * *; rm"])
def test_invalid_cron_expression_is_rejected(cron: str) -> None:
    with pytest.raises(InputError, match="is not a cron expression of six fields, seconds first"):
        check_cron(cron)


def test_wait_and_recurring_are_exclusive(api: KfpApi, submit: Submit) -> None:
    assert "--wait cannot be used with --recurring" in error_of(submit("--wait", "--recurring", "0 0 3 * * *"))
    assert api.requests == []


# --- objects in Kubernetes


class KubernetesApi:
    """The paths of the Kubernetes API that are read, for one namespace."""

    def __init__(self) -> None:
        self.existing = {"serviceaccounts/rlhf-runner", "persistentvolumeclaims/shared", "secrets/rlhf-s3"}
        self.existing.add("secrets/rlhf-mlflow")
        self.forbidden: set[str] = set()
        self.access_modes = ["ReadWriteMany"]
        self.pods: list[Any] = []
        self.events: list[Any] = []
        self.requested: list[str] = []

    def handle(self, method: str, url: str, headers: Any, body: bytes) -> dict[str, Any]:
        assert method == "GET"
        path, _, query = url.partition("?")
        if path.endswith(("/pods", "/events")):
            if path.rpartition("/")[2] in self.forbidden:
                raise HttpError(403, "forbidden")
            return self.answer(path, unquote(query))
        name = re.sub("^/(api/v1|apis/[^/]+/v1alpha1)/namespaces/kubeflow", "", url).strip("/")
        self.requested.append(name)
        if name in self.forbidden:
            raise HttpError(403, "forbidden")
        if name and name not in self.existing:
            raise HttpError(404, "not found")
        return {"metadata": {"name": name}, "spec": {"accessModes": self.access_modes}}

    def answer(self, path: str, query: str) -> dict[str, Any]:
        if path.endswith("/pods"):
            assert "labelSelector=pipeline/runid=" in query and "fieldSelector=status.phase=Pending" in query
            return {"items": self.pods}
        assert "fieldSelector=involvedObject.name=" in query and "type=Warning" in query
        return {"items": self.events}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[KubernetesApi]:
    """The cluster of kubectl's current context."""
    api = KubernetesApi()
    with serving(api) as address:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield api


S3 = ("--set", "storage.checkpoint_uri=s3://rlhf/checkpoints")
SHARED_CLAIM = ("--set", "cluster.checkpoint_claim=shared")


def test_missing_objects_are_reported_before_anything_is_created(
    api: KfpApi, submit: Submit, cluster: KubernetesApi
) -> None:
    assert submit("--dry-run", *SHARED_CLAIM).returncode == 0
    required = ["serviceaccounts/rlhf-runner", "persistentvolumeclaims/shared"]
    assert cluster.requested == ["", *required, "secrets/rlhf-mlflow"]
    cluster.existing = set()
    assert "ServiceAccount rlhf-runner does not exist in namespace kubeflow (kubectl context here)" in error_of(
        submit()
    )
    cluster.existing = {"serviceaccounts/rlhf-runner"}
    assert "PersistentVolumeClaim shared does not exist" in error_of(submit(*SHARED_CLAIM))
    assert "Secret rlhf-s3 does not exist" in error_of(submit(*S3))
    assert "Secret registry does not exist" in error_of(submit("--set", "cluster.image_pull_secrets=[registry]"))
    assert api.num_created == 0


def test_runtime_of_trainjobs_must_exist(api: KfpApi, submit: Submit, cluster: KubernetesApi) -> None:
    launcher = ("--set", "cluster.launcher=trainjob", *SHARED_CLAIM)
    message = error_of(submit(*launcher))
    assert "TrainingRuntime rlhf does not exist in namespace kubeflow" in message
    assert "install Kubeflow Trainer 2.2 or newer and add manifests/components/trainjob" in message
    cluster.existing.add("trainingruntimes/rlhf")
    assert submit("--dry-run", *launcher).returncode == 0
    assert api.num_created == 0


@pytest.mark.parametrize("modes", [["ReadWriteOnce"], ["ReadWriteOncePod"], ["ReadOnlyMany", "ReadWriteOnce"]])
def test_shared_claim_that_two_runs_cannot_mount_is_refused(
    api: KfpApi, submit: Submit, cluster: KubernetesApi, modes: list[str]
) -> None:
    cluster.access_modes = modes
    message = error_of(submit(*SHARED_CLAIM))
    assert (
        f"shared (cluster.checkpoint_claim) has the access mode {', '.join(modes)}: a second run on another node"
        in message
    )
    assert submit("--dry-run", *S3).returncode == 0
    assert api.num_created == 0


UNSCHEDULABLE = {
    "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes are available:\n 1 Insufficient cpu.",
}  # fmt: skip
PULL_FAILS = {"name": "main", "image": "r/trainer:1", "imageID": "", "ready": False, "restartCount": 0,
              "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image r/trainer:1"}}}  # fmt: skip
CREATING = PULL_FAILS | {"state": {"waiting": {"reason": "ContainerCreating"}}}
EVENT = {
    "metadata": {"name": "e"},
    "involvedObject": {},
    "reason": "FailedMount",
    "message": "volume x is in use by another node",
}


@pytest.mark.parametrize(
    ("status", "events", "expected"),
    [
        ({"conditions": [UNSCHEDULABLE]}, [], "ppo: Unschedulable: 0/1 nodes are available: 1 Insufficient cpu."),
        ({"containerStatuses": [PULL_FAILS]}, [], "ppo: ImagePullBackOff: Back-off pulling image r/trainer:1"),
        ({"initContainerStatuses": [PULL_FAILS]}, [], "ppo: ImagePullBackOff: Back-off pulling image r/trainer:1"),
        ({"containerStatuses": [CREATING]}, [EVENT], "ppo: FailedMount: volume x is in use by another node"),
        ({"containerStatuses": [CREATING]}, [], None),
        ({}, [], None),
    ],
)
def test_wait_says_why_a_pod_is_pending(
    submit: Submit, api: KfpApi, cluster: KubernetesApi, monkeypatch: pytest.MonkeyPatch, status: Any, events: Any,
    expected: str | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cluster.pods = [{"metadata": {"name": "ppo-1", "labels": {"kfp-rlhf/stage": "ppo"}}, "status": status}]
    cluster.events = events
    api.states = ["PENDING", "RUNNING", "RUNNING", "SUCCEEDED"]
    result = submit("--wait", *S3)
    assert result.returncode == 0, result.stderr
    found = [line.removeprefix("pending  ") for line in result.stdout.splitlines() if line.startswith("pending")]
    assert found == ([expected] if expected else [])  # once, although it is polled three times


@pytest.mark.parametrize("forbidden", ["pods", "events"])
def test_wait_goes_on_without_permission_to_read_pods(
    submit: Submit, cluster: KubernetesApi, monkeypatch: pytest.MonkeyPatch, forbidden: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cluster.pods = [{"metadata": {"name": "ppo-1"}, "status": {}}]
    cluster.forbidden = {forbidden}
    assert submit("--wait", *S3).returncode == 0


def test_unreadable_objects_are_only_a_note(submit: Submit, cluster: KubernetesApi) -> None:
    cluster.forbidden = {"secrets/rlhf-s3"}
    result = submit(*S3, "--dry-run")
    assert result.returncode == 0
    assert "note     Could not be checked in namespace kubeflow: Secret rlhf-s3." in result.stdout


def test_missing_optional_secrets_are_only_a_note(submit: Submit, cluster: KubernetesApi) -> None:
    assert "note" not in submit("--dry-run", *S3, "--set", "storage.publish_uri=s3://rlhf/models").stdout
    notes = [line for line in submit("--dry-run").stdout.splitlines() if line.startswith("note")]
    assert ["no checkpoints are saved" in notes[0], "no model is published" in notes[1], len(notes)] == [
        True,
        True,
        2,
    ]
    cluster.existing.discard("secrets/rlhf-mlflow")
    note = "Secret rlhf-mlflow does not exist in namespace kubeflow: the run is not tracked, and no model version is registered."
    assert f"note     {note}\n" in submit("--dry-run").stdout
    assert "rlhf-mlflow" not in submit("--dry-run", "--set", "tracking.uri=http://mlflow:5000").stdout
    hub = submit("--dry-run", "--set", "model.source=org/model")
    assert (
        "rlhf-hf-token does not exist in namespace kubeflow: org/model can be downloaded only if public." in hub.stdout
    )


ENDPOINT = ("--set", "judge={kind: endpoint, url: 'https://api.example.com/v1', model: gpt}")


def test_missing_secret_of_a_judge_is_only_a_note(submit: Submit, cluster: KubernetesApi) -> None:
    note = "Secret rlhf-judge does not exist in namespace kubeflow: https://api.example.com/v1 is asked without an API key."
    assert f"note     {note}\n" in submit("--dry-run", *ENDPOINT).stdout
    without_key = submit("--dry-run", *ENDPOINT, "--set", "judge.api_key_variable=null")
    assert "rlhf-judge" not in submit("--dry-run").stdout + without_key.stdout
    assert "rlhf-judge" not in submit("--dry-run", *ENDPOINT, "--set", "cluster.secrets.judge=null").stdout
    cluster.existing.add("secrets/rlhf-judge")
    assert "rlhf-judge" not in submit("--dry-run", *ENDPOINT).stdout


def test_answers_that_are_not_kept_are_a_note(submit: Submit, cluster: KubernetesApi) -> None:
    note = "note     the answers of endpoints are not kept: a stage that is retried, and the next run, ask the endpoint again."
    assert note in submit("--dry-run", *ENDPOINT).stdout
    assert "answers" not in submit("--dry-run").stdout
    for uri in ("storage.uri", "storage.answers_uri"):
        assert "answers are not kept" not in submit("--dry-run", *ENDPOINT, "--set", f"{uri}=s3://rlhf/answers").stdout


def test_credentials_for_the_answers_must_exist(submit: Submit, cluster: KubernetesApi) -> None:
    answers = ("--set", "storage.answers_uri=s3://rlhf/answers")
    cluster.existing.discard("secrets/rlhf-s3")
    assert "Secret rlhf-s3 does not exist" in error_of(submit("--dry-run", *ENDPOINT, *answers))
    assert submit("--dry-run", *answers).returncode == 0  # no stage keeps answers


def test_secrets_of_an_imported_judge_are_checked(submit: Submit, cluster: KubernetesApi) -> None:
    hub = submit("--dry-run", "--set", "judge=[{kind: reward_model, use: org/second}]")
    assert (
        "rlhf-hf-token does not exist in namespace kubeflow: org/second can be downloaded only if public." in hub.stdout
    )
    cluster.existing.discard("secrets/rlhf-s3")
    s3 = submit("--dry-run", "--set", "judge={kind: reward_model, use: 's3://rlhf/second'}")
    assert "Secret rlhf-s3 does not exist" in error_of(s3)


def test_named_context_must_be_usable(submit: Submit, cluster: KubernetesApi) -> None:
    assert "--kube-context there: namespace kubeflow cannot be read" in error_of(submit("--kube-context", "there"))
    cluster.existing = set()
    assert submit("--kube-context", "", "--dry-run").returncode == 0
    assert submit("--kube-context", "here", "--dry-run").returncode == 1


def test_checks_are_skipped_without_a_kubeconfig(submit: Submit) -> None:
    result = submit("--dry-run")
    assert result.returncode == 0 and "note     Secrets, ServiceAccount and volumes were not checked" in result.stdout


# --- manifests and differences


def test_manifests_are_a_pipeline_and_a_pipeline_version(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pipelines",
        "compile",
        TINY,
        "--format",
        "manifests",
        "--namespace",
        "team",
        "--out",
    ]
    result = subprocess.run([*command, str(tmp_path / "m.yaml")], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    pipeline, version = yaml.safe_load_all((tmp_path / "m.yaml").read_text())
    for document, kind in ((pipeline, "Pipeline"), (version, "PipelineVersion")):
        assert (document["apiVersion"], document["kind"]) == ("pipelines.kubeflow.org/v2beta1", kind)
        assert document["metadata"]["namespace"] == "team"
        # An RFC 1123 subdomain, or Kubernetes refuses it.
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", document["metadata"]["name"])
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "rlhf"
    assert "exec-ppo" in version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_differences_of_small_specs(tmp_path: Path) -> None:
    def spec(settings: str, cpu: str, **more: Any) -> list[Any]:
        executors = {f"exec-{s}": {"container": {"cpu": cpu}} for s in ("a", "b")}
        tasks = {"a": {"inputs": {"parameters": {"settings": {"runtimeValue": {"constant": settings}}}}}}
        pipeline = {
            "deploymentSpec": {"executors": executors},
            "components": {"comp-exit-handler-1": {"dag": {"tasks": tasks}}},
            "sdkVersion": "kfp-2.17.0",
        }
        return [pipeline | more, {}]

    (tmp_path / "new.yaml").write_text(yaml.safe_dump_all(spec('{"x": 2, "y": [1, "t"]}', "4", root=3)))
    old = spec('{"x": 1.0, "z": null}', "2")[0] | {"sdkVersion": "kfp-2.16.0"}
    assert differences({"pipeline_spec": old, "platform_spec": {}}, tmp_path / "new.yaml") == [
        '~ a, b: container.cpu: "2" -> "4"',
        "+ root: 3",
        "~ a: settings.x: 1 -> 2",
        "+ a: settings.y[0]: 1",
        '+ a: settings.y[1]: "t"',
        "- a: settings.z: null",
    ]
