"""export and serve, on a run directory with a tiny policy."""

import json
import os
import shutil
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner, Result
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.rlhf.artifacts.manifest import read_manifest, write_manifest
from components.rlhf.config.cluster import Images
from components.rlhf.text.errors import InputError
from pipelines.__main__ import cli
from pipelines.settings import dump_yaml, load_params
from tests.support.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
CONVERT = """
import pathlib, sys
model, _, target, _, kind = sys.argv[1:]
if not (pathlib.Path(model) / "config.json").is_file(): sys.exit("no model")
pathlib.Path(target).write_text(kind)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "one"
    policy = make_tiny_model(folder / "artifacts/rlhf/ppo/model", seed=0, hidden_size=128)
    (policy / "history.jsonl").write_text("{}\n")
    config = json.loads((policy / "config.json").read_text())
    (policy / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 4096})
    )  # vLLM's warm-up is longer than 256
    write_manifest(policy, kind="policy_model", parents={"sft_model": "5" * 64})
    params = load_params(
        ROOT / "pipelines/params/tiny.yaml", ["model.source=org/base", "data.prompts.path=/home/me/p.jsonl"]
    )
    (folder / "params.yaml").write_text(dump_yaml(params))
    (folder / "run.json").write_text("{}")
    return folder


def evaluated(run: Path) -> None:
    numbers = {
        "num_prompts": 40.0,
        "confidence": 0.95,
        "win_rate": 0.7,
        "win_rate_low": 0.6,
        "win_rate_high": 0.8,
        "kl": 2.5,
    }
    summary = {
        "status": "succeeded",
        "promoted": True,
        "reason": "win rate 0.700 is above 0.5",
        "evaluation_all": numbers,
        "stages": {"ppo": {"seconds": 90.0, "peak_memory_bytes": 2 * 2**30, "memory": {}}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    policy = read_manifest(run / "artifacts/rlhf/ppo/model").digest
    for task, digest, detail in (
        ("evaluation", "6" * 64, "of another policy"),
        ("evaluation-2", policy, "It is, by far."),
    ):
        folder = run / "artifacts/rlhf" / task / "evaluation"
        folder.mkdir(parents=True)
        (folder / "findings.json").write_text(
            json.dumps([{"question": "Is it better?", "answer": "Yes", "detail": detail}])
        )
        write_manifest(folder, kind="evaluation", parents={"policy_model": digest})
    base = run / "artifacts/rlhf/import-model/base_model"
    base.mkdir(parents=True)
    write_manifest(base, kind="base_model", facts={"license": "Apache-2.0"})


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, list(map(str, arguments)))


def refusal(*arguments: object) -> str:
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError), result.output
    return str(result.exception)


def test_exported_folder_loads_in_transformers_and_has_a_model_card(run: Path, tmp_path: Path) -> None:
    evaluated(run)
    target = tmp_path / "new" / "exported"
    assert invoke("export", run, "--to", target).output == f"wrote {target}\n"
    model = AutoModelForCausalLM.from_pretrained(target)
    assert len(AutoTokenizer.from_pretrained(target)) == model.config.vocab_size
    assert {path.name for path in target.iterdir()} & {"manifest.json", "history.jsonl"} == set()
    card = ModelCard.load(target / "README.md")
    assert card.data.base_model == "org/base" and card.data.library_name == "transformers"
    assert "Promoted: win rate 0.700 is above 0.5." in card.text
    assert "| win rate (judge), [95% interval] |  | 0.700 [0.600, 0.800] |" in card.text
    assert "- prompts: `p.jsonl`" in card.text and "/home/me" not in card.text
    assert "5" * 64 in card.text
    assert card.data.license == "apache-2.0" and "as its source states it: Apache-2.0." in card.text
    assert "- Is it better? **Yes.** It is, by far." in card.text and "of another policy" not in card.text
    assert "| ppo | 1:30 | 2.00 |" in card.text
    assert list(target.parent.iterdir()) == [target]


def test_run_without_an_evaluation_says_so(run: Path, tmp_path: Path) -> None:
    assert invoke("export", run, "--to", tmp_path / "exported").exit_code == 0
    assert "This policy has not been evaluated." in (tmp_path / "exported" / "README.md").read_text()


def test_something_at_the_target_is_replaced_only_by_force(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    (target / "mine").touch()
    assert "already exists" in refusal("export", run, "--to", target)
    assert [path.name for path in target.iterdir()] == ["mine"]
    assert invoke("export", run, "--to", target, "--force").exit_code == 0
    assert not (target / "mine").exists() and (target / "config.json").exists()


def test_modified_policy_is_refused(run: Path, tmp_path: Path) -> None:
    (run / "artifacts/rlhf/ppo/model/config.json").write_text("{}")
    assert "does not match its manifest" in refusal("export", run, "--to", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("code", [CONVERT, "import sys; sys.exit('unsupported model')"])
def test_gguf_is_written_by_the_converter_of_llama_cpp(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    target = tmp_path / "exported"
    assert "set LLAMA_CPP" in refusal("export", run, "--to", target, "--gguf", "f16")
    (tmp_path / "convert_hf_to_gguf.py").write_text(code)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    if code == CONVERT:
        assert invoke("export", run, "--to", target, "--gguf", "f16").exit_code == 0
        assert (target / "model-f16.gguf").read_text() == "f16"
    else:
        assert "unsupported model" in refusal("export", run, "--to", target, "--gguf", "f16")
        assert not target.exists()


def test_hub_gets_a_private_repository(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, bool]] = []

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, commit_message: str) -> object:
        assert (
            repo_id == "me/policy"
            and (folder_path / "model.safetensors").is_file()
            and (folder_path / "README.md").is_file()
        )
        return type("Commit", (), {"commit_url": "https://huggingface.co/me/policy/commit/1"})

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, private, exist_ok: calls.append((name, private)))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert invoke("export", run, "--to", "hf://me/policy").output == "wrote https://huggingface.co/me/policy/commit/1\n"
    assert calls == [("me/policy", True)]


def test_hub_that_cannot_be_reached_is_one_sentence(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "set HF_TOKEN to a token with write access" in refusal("export", run, "--to", "hf://me/policy")


def test_inference_service_of_a_published_model() -> None:
    text = invoke("serve", "--print", "kserve", "--uri", "s3://models/My policy: 1", "--name", 'Mine "1"').output
    found = yaml.safe_load(text)
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert found["metadata"]["name"] == "mine-1"
    model = found["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "huggingface"} and model["storageUri"] == "s3://models/My policy: 1"
    assert model["args"] == ['--model_name=Mine "1"']


@pytest.mark.parametrize(("name", "resource"), [("quick", "quick"), ('8B "new"', "policy-8b-new"), ("äö", "policy")])
def test_deployment_of_a_published_model(name: str, resource: str) -> None:
    text = invoke("serve", "--print", "deployment", "--uri", "s3://models/My policy: 1", "--name", name).output
    deployment, service = yaml.safe_load_all(text)
    for item in (deployment, service):
        kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
        assert item["metadata"]["name"] == resource
    pod = deployment["spec"]["template"]
    (fetch,), (server,) = pod["spec"]["initContainers"], pod["spec"]["containers"]
    assert fetch["args"] == ["s3://models/My policy: 1", "/model/policy"]
    assert server["args"][:4] == ["--model", "/model/policy", "--served-model-name", name]
    assert {c["image"] for c in (fetch, server)} == {Images().rollout}
    module = ROOT / (fetch["command"][2].replace(".", "/") + ".py")
    assert module.is_file()
    # The rules of the namespaces of manifests/: Pod Security Standards, restricted.
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and not pod["spec"]["automountServiceAccountToken"]
    for container in (fetch, server):
        security = container["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]} and not security["allowPrivilegeEscalation"]
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    assert deployment["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    ports = {port["name"] for port in server["ports"]}
    assert {service["spec"]["ports"][0]["targetPort"]} == ports == {server["readinessProbe"]["httpGet"]["port"]}


def test_deployment_needs_a_model_in_s3(run: Path) -> None:
    assert "is a folder of this machine, which a cluster" in refusal("serve", run, "--print", "deployment")
    assert "is not in s3://" in refusal("serve", "--print", "deployment", "--uri", "gs://models/policy")


def test_command_is_quoted_for_a_shell(run: Path) -> None:
    other = run.with_name("it's one")
    shutil.copytree(run, other)
    text = invoke("serve", other, "--print", "command").output
    assert text.startswith("vllm serve '") and """it'"'"'s one""" in text and "--served-model-name tiny" in text


def test_folder_is_not_deployed_to_a_cluster(run: Path) -> None:
    assert "a cluster cannot read" in refusal("serve", run, "--print", "kserve")


def test_run_without_a_policy(run: Path) -> None:
    shutil.rmtree(run / "artifacts")
    assert "has no policy yet" in refusal("serve", run)
    assert "has no policy yet" in refusal("export", run, "--to", run / "x")


@pytest.mark.vllm
def test_vllm_serves_the_policy_of_a_run(run: Path, unused_port: int) -> None:
    import subprocess

    command = [sys.executable, "-m", "pipelines", "serve", str(run), "--check", "--port", str(unused_port)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # 18 s of compilation
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("This") and len(done.stdout) > len("This\n")


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
