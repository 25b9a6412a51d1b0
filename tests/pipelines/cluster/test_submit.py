"""Submitting to a server that speaks the published API, by the user's command; the client is kfp's own."""

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

import kfp
import pytest
import yaml
from kubernetes.config import kube_config

from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.cluster.server import ServerAccess, connect
from pipelines.cluster.submit import SubmitOptions, check_cron, wait
from pipelines.cluster.versions import differences
from tests.support.kfp_api import KfpApi, Refusal, serving
from tests.support.toy_pipeline import toy_params, write_data, write_params

ROOT = Path(__file__).resolve().parents[3]
TINY = "pipelines/params/tiny.yaml"


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Submit = Callable[..., Done]


@pytest.fixture
def api() -> KfpApi:
    return KfpApi()


@pytest.fixture
def host(api: KfpApi) -> Iterator[str]:
    with serving(api) as address:
        yield address


@pytest.fixture
def submit(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Submit:
    """The command, without the kubectl and the kfp context of whoever runs the tests."""
    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(kfp.Client, "_LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))
    monkeypatch.chdir(ROOT)

    def run(*arguments: str, params: str = TINY, **environment: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            try:
                cli.main(["submit", params, "--host", host, *arguments], standalone_mode=False)
                code, error = 0, ""
            except SystemExit as end:
                code, error = int(end.code or 0), ""
            except InputError as problem:  # what main() prints
                code, error = 1, f"error: {problem}\n"
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err + error)

    return run


def refused(done: Done) -> str:
    """The one sentence of a command that failed."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_run_of_a_named_version_is_started_and_followed(api: KfpApi, host: str, submit: Submit) -> None:
    done = submit("--experiment", "mine", "--name", "first", "--set", "tracking.uri=http://mlflow:5000")
    assert done.returncode == 0, done.stderr
    ((run_id, run),) = api.runs.items()
    (version,) = api.versions.values()
    (experiment,) = api.experiments.values()
    assert re.fullmatch(r"rlhf-0\.1\.0-[0-9a-f]{12}(-dirty)?-[0-9a-f]{8}", version["display_name"])
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert run["display_name"] == "first" and run["service_account"] == "rlhf-runner"
    assert experiment["display_name"] == "mine" and run["experiment_id"] == experiment["experiment_id"]
    assert f"{host}/#/runs/details/{run_id}" in done.stdout
    assert f"pods     kubectl -n kubeflow get pods -l pipeline/runid={run_id}\n" in done.stdout
    assert f"http://mlflow:5000/#/experiments: experiment kfp-rlhf, tags.`rlhf.run_id` = '{run_id}'" in done.stdout
    assert version["display_name"] in done.stdout


def test_the_same_content_is_the_same_version_and_a_dry_run_tells_differences(api: KfpApi, submit: Submit) -> None:
    first = submit("--dry-run")
    assert "the first version of the pipeline rlhf" in first.stdout and api.made == 0
    assert submit().returncode == 0
    again = submit("--recurring", "0 0 3 * * *")
    assert again.returncode == 0, again.stderr
    assert len(api.versions) == 1 and len(api.runs) == 1
    (schedule,) = api.recurring_runs.values()
    (version,) = api.versions.values()
    assert schedule["trigger"] == {"cron_schedule": {"cron": "0 0 3 * * *"}}
    assert schedule["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert (schedule["max_concurrency"], schedule["no_catchup"], schedule["mode"]) == ("1", True, "ENABLE")
    assert schedule["service_account"] == "rlhf-runner"
    made = api.made
    assert f"no difference from {version['display_name']}" in submit("--dry-run").stdout
    changed = submit(
        "--dry-run", "--set", "ppo.kl_coef=0.1", "--set", "cluster.stages={sft: cpu-large, ppo: cpu-large}"
    )
    assert [line for line in changed.stdout.splitlines() if line[:2] in ("~ ", "+ ", "- ")] == [
        '~ ppo, sft: container.resources.resourceCpuLimit: "2" -> "8"',
        '~ ppo, sft: container.resources.resourceCpuRequest: "2" -> "8"',
        '~ ppo, sft: container.resources.resourceMemoryLimit: "8Gi" -> "64Gi"',
        '~ ppo, sft: container.resources.resourceMemoryRequest: "8Gi" -> "64Gi"',
        "~ ppo: settings.ppo.kl_coef: 0.05 -> 0.1",
    ]
    gpus = submit("--dry-run", "--set", "cluster.stages={ppo: gpu-24gb}").stdout
    assert '+ run parameter gpu_tolerations[0].key: "nvidia.com/gpu"' in gpus
    assert "+ ppo: nodeSelector.nodeSelectorJson" in gpus and ".pipelinechannel--" not in gpus  # plumbing
    assert api.made == made


@pytest.mark.parametrize(("states", "code"), [(["SUCCEEDED"], 0), (["RUNNING", "FAILED"], 1), (["CANCELED"], 1)])
def test_waiting_ends_as_the_run_ends(api: KfpApi, submit: Submit, states: list[str], code: int) -> None:
    api.states = states
    api.broken_looks = 0
    done = submit("--wait")
    assert done.returncode == code, done.stderr
    assert f"state    {states[-1].lower()}" in done.stdout
    assert ("Workflow failed: task ppo" in done.stdout) == (states[-1] == "FAILED")


def test_a_server_that_is_away_for_a_while_is_waited_for(api: KfpApi, host: str) -> None:
    access = ServerAccess(host)
    server = connect(access)
    api.runs["r"] = {"run_id": "r"}
    api.states, api.broken_looks = ["SUCCEEDED"], 3
    said: list[str] = []
    assert wait(server, access, "r", SubmitOptions("x", poll_seconds=0.01), said.append) == 0
    assert said == ["state    succeeded"] and api.broken_looks == 0
    with pytest.raises(InputError, match=r"refuses \(404\): Run gone not found"):
        wait(server, access, "gone", SubmitOptions("x", poll_seconds=0.01), said.append)


# --- who may, and where


def test_a_token_and_a_namespace(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    api.token, api.multi_user, api.namespaces_with_rights = "s3cret", True, {"team"}
    assert "does not accept who you are (401)" in refused(submit("--namespace", "team"))
    (tmp_path / "token").write_text("s3cret\n")
    token = ("--token-file", str(tmp_path / "token"))
    assert "serves several users; name your namespace with --namespace" in refused(submit(*token))
    assert "does not let you use namespace other (403)" in refused(submit(*token, "--namespace", "other"))
    assert api.made == 0
    done = submit(*token, "--namespace", "team")
    assert done.returncode == 0, done.stderr
    assert [e["namespace"] for e in api.experiments.values()] == ["team"]
    assert [p["namespace"] for p in api.pipelines.values()] == ["team"]
    assert submit("--namespace", "team", KFP_TOKEN="s3cret").returncode == 0
    assert "s3cret" not in done.stdout + done.stderr


def test_cookies(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    api.cookie = "authservice_session=abc"
    assert "(401)" in refused(submit())
    assert submit(KFP_COOKIES="authservice_session=abc").returncode == 0
    (tmp_path / "empty").write_text("\n")
    assert "is empty; write the secret into it" in refused(submit("--cookies-file", str(tmp_path / "empty")))


def test_a_namespace_is_not_sent_to_a_server_for_one_user(api: KfpApi, submit: Submit) -> None:
    done = submit("--namespace", "kubeflow")
    assert done.returncode == 0, done.stderr
    assert [e.get("namespace", "") for e in api.experiments.values()] == [""]


# --- no server, a wrong one, an old one


def test_without_a_server_one_sentence_in_seconds(tmp_path: Path) -> None:
    """The whole command, in a process of its own."""
    command = [sys.executable, "-m", "pipelines", "submit", TINY, "--host", "http://127.0.0.1:9"]
    environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - started < 30  # most of it imports, on a busy machine
    assert "http://127.0.0.1:9 cannot be reached" in refused(Done(done.returncode, done.stdout, done.stderr))


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:9", "--host 127.0.0.1:9 is no address; write http(s)://HOST[:PORT]."),
        ("https://127.0.0.1:9", "cannot be reached"),
    ],
)
def test_an_address_that_is_none(address: str, sentence: str, submit: Submit) -> None:
    assert sentence in refused(submit("--host", address))


def test_a_plain_server_behind_https_is_one_sentence(host: str, submit: Submit) -> None:
    assert "cannot be reached" in refused(submit("--host", host.replace("http:", "https:")))


@pytest.mark.parametrize(
    ("version", "store", "sentence"),
    [
        ("2.15.2", "database", "runs Kubeflow Pipelines 2.15.2, and this pipeline needs 2.16 or newer"),
        ("v1.8.22", None, "runs Kubeflow Pipelines v1.8.22, and"),
        ("unknown", None, "runs Kubeflow Pipelines older than 2.14, and"),
    ],
)
def test_an_old_server_is_refused(api: KfpApi, submit: Submit, version: str, store: str | None, sentence: str) -> None:
    api.version, api.pipeline_store = version, store
    assert sentence in refused(submit())
    assert api.made == 0


@pytest.mark.parametrize("version", ["2.16.0", "3.0.1", "unknown", None])
def test_a_new_one_and_a_build_without_a_version_are_taken(api: KfpApi, submit: Submit, version: str | None) -> None:
    api.version = version
    assert submit("--dry-run").returncode == 0


def test_through_the_ui(api: KfpApi, submit: Submit) -> None:
    """As the platform's gateway and the port-forward of the README reach it."""
    api.behind_ui = True
    done = submit()
    assert done.returncode == 0, done.stderr
    api.version = "2.15.2"
    assert "runs Kubeflow Pipelines 2.15.2, and" in refused(submit())
    api.version, api.pipeline_store = None, None
    assert "runs Kubeflow Pipelines older than 2.14, and" in refused(submit())
    api.pipeline_store, api.multi_user = "kubernetes", True
    assert "serves several users; name your namespace with --namespace" in refused(submit())
    api.ready = False
    assert "is the UI of Kubeflow Pipelines, and the API behind it does not answer" in refused(submit())


class Login:
    """A gateway that shows its login page, on every path or (as many do) on all but the health of the server."""

    def __init__(self, page: Any, *, health_is_open: bool) -> None:
        self.page, self.api = page, KfpApi() if health_is_open else None

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> Any:
        if self.api and "healthz" in url:
            return self.api.answer(method, url, headers, body)
        if isinstance(self.page, Exception):
            raise self.page
        return self.page


@pytest.mark.parametrize("health_is_open", [False, True])
@pytest.mark.parametrize(
    ("page", "what"), [(b"<html>Log in</html>", "a page"), (Refusal(302, "to /dex/auth"), "a redirection (302)")]
)
def test_a_login_page(submit: Submit, page: Any, what: str, health_is_open: bool) -> None:
    with serving(Login(page, health_is_open=health_is_open)) as address:
        said = refused(submit("--host", address))
    assert f"answers with {what} where Kubeflow Pipelines' API answers JSON" in said and "--cookies-file" in said


def test_something_else_that_answers(submit: Submit) -> None:
    class Nothing:
        def answer(self, *_: Any) -> bytes:
            raise Refusal(404, "no such page")

    class Numbers:
        def answer(self, *_: Any) -> bytes:
            return b"[1, 2]"

    with serving(Nothing()) as address:
        assert "is no Kubeflow Pipelines of version 2" in refused(submit("--host", address))
    with serving(Numbers()) as address:
        assert "answers JSON" in refused(submit("--host", address))


def test_a_token_that_expires_before_anything_is_made(api: KfpApi, submit: Submit, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("yesterday's")
    api.token = "today's"
    said = refused(submit("--token-file", str(tmp_path / "token")))
    assert "(401); give a token (--token-file or KFP_TOKEN), a new one if it has expired" in said
    assert "yesterday" not in said and api.made == 0
    said = refused(submit("--token-file", str(tmp_path / "none")))
    assert "none cannot be read (No such file or directory); write the secret into it." in said


def test_what_the_server_says_is_passed_on(api: KfpApi, submit: Submit) -> None:
    def full(*_: Any) -> None:
        raise Refusal(500, "database is read-only")

    api.create_run = full  # type: ignore[method-assign, assignment]
    assert "refuses (500): database is read-only" in refused(submit())


# --- local data


@pytest.fixture
def local(tmp_path: Path, tiny_model: Path) -> str:
    """Params whose model and data lie on this machine."""
    return str(write_params(tmp_path / "toy.yaml", toy_params(tiny_model, write_data(tmp_path))))


def test_local_data_needs_a_place(api: KfpApi, submit: Submit, local: str) -> None:
    assert "which a cluster cannot read; set storage.uri to s3://BUCKET/PREFIX" in refused(submit(params=local))
    assert "a folder that a cluster cannot read" in refused(submit("--set", "storage.uri=/somewhere", params=local))
    assert api.made == 0


def test_local_data_goes_to_the_store_under_its_digest(
    api: KfpApi, submit: Submit, local: str, tmp_path: Path, tiny_model: Path
) -> None:
    store = tmp_path / "shared"
    configure_task = ("--set", f"storage.uri={store}", "--set", f"cluster.claims={{{store}: shared}}")
    rehearsed = submit("--dry-run", *configure_task, params=local)
    assert rehearsed.stdout.count("would copy") == 3 + len(list(tiny_model.iterdir())) and not store.exists()
    done = submit(*configure_task, params=local)
    assert done.returncode == 0, done.stderr
    (version,) = api.versions.values()
    spec = json.dumps(version["pipeline_spec"])
    uploads = sorted(set(re.findall(rf"{store}/uploads/sha256-[0-9a-f]{{64}}[^\\\"]*", spec)))
    assert len(uploads) == 4 and str(tiny_model) not in spec
    for path in map(Path, uploads):
        original = tiny_model if path.is_dir() else tmp_path / path.name
        names = [p.name for p in original.iterdir()] if path.is_dir() else [""]
        assert all((path / name).read_bytes() == (original / name).read_bytes() for name in names)
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = submit(*configure_task, params=local)
    assert "copying" not in again.stdout and len(api.versions) == 1
    assert before == {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


def test_a_broken_line_is_found_before_anything_is_asked(
    api: KfpApi, submit: Submit, local: str, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": ')
    assert "prompts.jsonl:1 is not JSON" in refused(submit(params=local))
    (tmp_path / "prompts.jsonl").unlink()
    assert "prompts.jsonl does not exist" in refused(submit(params=local))
    assert api.requests == []


# --- what could not run on a cluster


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["storage.checkpoint_uri=/home/me/checkpoints"], "a folder that no pod has; leave it null"),
        (
            ["storage.checkpoint_uri=/checkpoints/x", "cluster.checkpoint_claim=null"],
            "cluster.checkpoint_claim names none",
        ),
        (["storage.publish_uri=/home/me/models"], "storage.publish_uri is /home/me/models, a folder that no pod has"),
        (["tracking.uri=sqlite:////home/me/mlflow.db"], "which is on this machine; write the http(s) address"),
        (["cluster.require_digests=true"], "cluster.images.rollout is kfp-rlhf/rollout:0.1.0, which has no digest"),
        (["cluster.stages={ppo: gpu-80g}"], "did you mean gpu-80gb?"),
        (["ppo.kl_coeff=1"], "did you mean ppo.kl_coef?"),
    ],
)
def test_settings_that_no_cluster_can_run(api: KfpApi, submit: Submit, overrides: list[str], sentence: str) -> None:
    arguments = [part for override in overrides for part in ("--set", override)]
    assert sentence in refused(submit(*arguments))
    assert api.requests == []


@pytest.mark.parametrize("cron", ["0 3 * * *", "every night", "", "0 0 3 * *; rm"])
def test_a_schedule_that_is_none(cron: str) -> None:
    with pytest.raises(InputError, match="six are wanted, seconds first"):
        check_cron(cron)


def test_a_schedule_is_not_waited_for(api: KfpApi, submit: Submit) -> None:
    assert "do not go together" in refused(submit("--wait", "--recurring", "0 0 3 * * *"))
    assert api.requests == []


# --- what the tasks name in Kubernetes


class Kubernetes:
    """The few paths of the Kubernetes API that are read, for one namespace."""

    def __init__(self) -> None:
        self.there = {"serviceaccounts/rlhf-runner", "persistentvolumeclaims/rlhf-checkpoints", "secrets/rlhf-s3"}
        self.there.add("secrets/rlhf-mlflow")
        self.forbidden: set[str] = set()
        self.asked: list[str] = []

    def answer(self, method: str, url: str, headers: Any, body: bytes) -> dict[str, Any]:
        assert method == "GET"
        name = url.removeprefix("/api/v1/namespaces/kubeflow").strip("/")
        self.asked.append(name)
        if name in self.forbidden:
            raise Refusal(403, "forbidden")
        if name and name not in self.there:
            raise Refusal(404, "not found")
        return {"metadata": {"name": name}}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Kubernetes]:
    """A cluster that kubectl's current context points to."""
    found = Kubernetes()
    with serving(found) as address:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "c", "cluster": {"server": address}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "here", "context": {"cluster": "c", "user": "u"}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield found


S3 = ("--set", "storage.checkpoint_uri=s3://rlhf/checkpoints")


def test_what_is_missing_is_said_before_anything_is_made(api: KfpApi, submit: Submit, cluster: Kubernetes) -> None:
    assert submit("--dry-run").returncode == 0
    needed = ["serviceaccounts/rlhf-runner", "persistentvolumeclaims/rlhf-checkpoints"]
    assert cluster.asked == ["", *needed, "secrets/rlhf-mlflow"]
    cluster.there = set()
    assert "ServiceAccount rlhf-runner does not exist in namespace kubeflow (kubectl context here)" in refused(submit())
    cluster.there = {"serviceaccounts/rlhf-runner"}
    assert "PersistentVolumeClaim rlhf-checkpoints does not exist" in refused(submit())
    assert "Secret rlhf-s3 does not exist" in refused(submit(*S3))
    assert "Secret registry does not exist" in refused(submit("--set", "cluster.image_pull_secrets=[registry]"))
    assert api.made == 0


def test_what_may_not_be_read_is_said_and_no_obstacle(submit: Submit, cluster: Kubernetes) -> None:
    cluster.forbidden = {"secrets/rlhf-s3"}
    done = submit(*S3, "--dry-run")
    assert done.returncode == 0
    assert "note     Could not be looked up in namespace kubeflow: Secret rlhf-s3." in done.stdout


def test_what_a_run_does_without_is_said(submit: Submit, cluster: Kubernetes) -> None:
    assert "note" not in submit("--dry-run").stdout
    cluster.there.discard("secrets/rlhf-mlflow")
    lost = "Secret rlhf-mlflow does not exist in namespace kubeflow: the run is tracked nowhere, and no version is registered."
    assert f"note     {lost}\n" in submit("--dry-run").stdout
    assert "rlhf-mlflow" not in submit("--dry-run", "--set", "tracking.uri=http://mlflow:5000").stdout
    hub = submit("--dry-run", "--set", "model.source=org/model")
    assert (
        "rlhf-hf-token does not exist in namespace kubeflow: org/model can be fetched only if it is public."
        in hub.stdout
    )


def test_a_context_that_was_named_must_answer(submit: Submit, cluster: Kubernetes) -> None:
    assert "--kube-context there cannot be asked about namespace kubeflow" in refused(submit("--kube-context", "there"))
    cluster.there = set()
    assert submit("--kube-context", "", "--dry-run").returncode == 0
    assert submit("--kube-context", "here", "--dry-run").returncode == 1


def test_without_kubectl_nothing_is_looked_up(submit: Submit) -> None:
    done = submit("--dry-run")
    assert done.returncode == 0 and "note     Secrets, account and volumes were not looked up" in done.stdout


# --- manifests, and differences on their own


def test_manifests_are_a_pipeline_and_its_version(tmp_path: Path) -> None:
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
    done = subprocess.run([*command, str(tmp_path / "m.yaml")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pipeline, version = yaml.safe_load_all((tmp_path / "m.yaml").read_text())
    for document, kind in ((pipeline, "Pipeline"), (version, "PipelineVersion")):
        assert (document["apiVersion"], document["kind"]) == ("pipelines.kubeflow.org/v2beta1", kind)
        assert document["metadata"]["namespace"] == "team"
        # An RFC 1123 subdomain, or Kubernetes refuses it.
        assert re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", document["metadata"]["name"])
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"] == "rlhf"
    assert "exec-ppo" in version["spec"]["platformSpec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_differences_by_hand(tmp_path: Path) -> None:
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
