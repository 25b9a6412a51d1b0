"""A registered version as a model of MLflow: loaded by its alias, it answers prompts with the linked weights."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.models import Model
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.register.describe import Outcome, as_description, lineage_of
from components.register.model_folder import Link, example_of, link_to, write_model_folder
from components.register.served_model import PolicyError, verify
from components.register.source import Source
from components.rlhf.artifacts.manifest import Manifest, read_manifest, write_manifest
from components.rlhf.config.storage import StorageConfig, TrackingConfig
from components.rlhf.storage.copy import upload_folder
from components.rlhf.storage.store import open_store
from components.rlhf.tracking.registry import register_version
from components.rlhf.tracking.texts import database_uri
from tests.support.limited_s3 import LimitedS3
from tests.support.mlflow_database import default_database, new_database
from tests.support.tiny_model import make_tiny_model

PROMPT, NEW_TOKENS = "The film is", 7


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as PPO writes it."""
    folder = make_tiny_model(tmp_path_factory.mktemp("policy") / "model", seed=3, num_layers=1)
    write_manifest(folder, kind="policy_model", parents={"sft_model": "abc"}, facts={"kl": 1.5, "guard": "none"})
    return folder


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(
        uri=database_uri(new_database(tmp_path_factory.mktemp("registry"))), registered_model="it's mine"
    )


@pytest.fixture(scope="module")
def uri(tracking: TrackingConfig, policy: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The champion, registered in a run."""
    folder = tmp_path_factory.mktemp("version")
    model = read_manifest(policy)
    write_model_folder(folder, link_to(Source(str(policy)), model, example=PROMPT), max_new_tokens=NEW_TOKENS)
    verdict = Manifest(
        kind="evaluation",
        files={},
        facts={"decision": "promote", "reason": "better", "win_rate": 0.7, "confidence": 0.95},
    )
    version = register_version(
        tracking, folder=folder, run_id="r", decision="promote", reason="better", lineage=lineage_of(model, verdict),
        description=as_description(model, verdict, Outcome("promote", "better"), uri=str(policy)),
    )  # fmt: skip
    assert version == "1"
    return f"models:/{tracking.registered_model}@champion"


@pytest.fixture(autouse=True)
def _registry(tracking: TrackingConfig) -> Iterator[None]:
    with default_database(str(tracking.uri)):
        yield


def greedy(folder: Path, prompt: str, num_tokens: int) -> str:
    """The most likely token at each step, one forward pass of the whole text after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < num_tokens and tokenizer.eos_token_id not in new:
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return str(tokenizer.decode(new, skip_special_tokens=True))


def test_champion_answers_prompts_in_every_form_that_mlflow_takes(uri: str, policy: Path) -> None:
    model = mlflow.pyfunc.load_model(uri)
    expected, other = greedy(policy, PROMPT, NEW_TOKENS), greedy(policy, "x", NEW_TOKENS)
    assert expected and expected != other
    assert model.predict(PROMPT) == [expected]
    assert model.predict([PROMPT, "x"]) == [expected, other]
    assert model.predict(pd.DataFrame({"prompt": ["x", PROMPT]})) == [other, expected]
    assert model.predict(PROMPT, params={"max_new_tokens": 2}) == [greedy(policy, PROMPT, 2)]
    torch.manual_seed(0)
    sampled = {model.predict(PROMPT, params={"temperature": 2.0})[0] for _ in range(5)}
    assert len(sampled) > 1


@pytest.mark.parametrize("params", [{"max_new_tokens": -1}, {"temperature": -0.5}])
def test_impossible_params_are_refused(uri: str, params: dict[str, Any]) -> None:
    with pytest.raises(Exception, match="must be at least"):
        mlflow.pyfunc.load_model(uri).predict(PROMPT, params=params)


def test_version_says_what_it_is(tracking: TrackingConfig, uri: str, policy: Path) -> None:
    client = MlflowClient(tracking_uri=tracking.uri)
    version = client.get_model_version_by_alias(tracking.registered_model, "champion")
    assert client.get_model_version_by_alias(tracking.registered_model, "candidate").version == version.version
    assert version.tags["digest"] == read_manifest(policy).digest and version.tags["parent_sft_model"] == "abc"
    assert version.description.startswith("**Promoted to champion**: better.") and "0.700" in version.description
    assert version.run_id  # the parent run, which the UI links to
    folder = Path(mlflow.artifacts.download_artifacts(uri))
    info = Model.load(folder)
    assert [column.type.name for column in info.signature.inputs] == ["string"]
    assert info.signature.params.to_dict()[0]["default"] == NEW_TOKENS
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 30_000  # no second copy
    assert info.load_input_example(str(folder)) == [PROMPT] and info.load_input_example_params(str(folder)) == {
        "max_new_tokens": NEW_TOKENS
    }


def test_requirements_are_packages_that_pip_finds(uri: str) -> None:
    lines = (Path(mlflow.artifacts.download_artifacts(uri)) / "requirements.txt").read_text(encoding="utf-8").split()
    assert [line.replace(">", "=").partition("=")[0] for line in lines] == ["mlflow", "torch", "transformers", "boto3"]
    assert not any("+" in line for line in lines)  # as in 2.9.0+cpu, which only one index has


@pytest.mark.slow
def test_version_loads_without_this_repository(uri: str, tracking: TrackingConfig, tmp_path: Path) -> None:
    """Only from the folder of the version, in a process that cannot import components."""
    folder = mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path))
    code = f"""
import sys
sys.modules["components"] = None
sys.path.insert(0, {str(Path(folder) / "code")!r})
import served_model
print(served_model._load_pyfunc({folder!r}).predict({PROMPT!r}, {{"max_new_tokens": 3}}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")


def copy_of(policy: Path, folder: Path) -> Path:
    return Path(shutil.copytree(policy, folder / "copy"))


def change_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def change_fact(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_text(file.read_text(encoding="utf-8").replace("1.5", "0.5"), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, "model.safetensors has changed"),
        (change_fact, "it is another model"),
        (lambda folder: (folder / "config.json").unlink(), "config.json was deleted"),
        (lambda folder: (folder / "modeling.py").write_text("import os"), "modeling.py was added"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "no valid manifest.json"),
        (lambda folder: (folder / "manifest.json").unlink(), "no valid manifest.json"),
    ],
)
def test_other_weights_are_refused(policy: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder, digest = copy_of(policy, tmp_path), read_manifest(policy).digest
    verify(folder, digest)
    change(folder)
    with pytest.raises(PolicyError, match=message):
        verify(folder, digest)


def test_weights_that_have_moved_are_found_by_their_digest(uri: str, policy: Path, tmp_path: Path) -> None:
    folder = copy_of(policy, tmp_path)
    model = mlflow.pyfunc.load_model(uri, model_config={"weights": str(folder)})
    assert model.predict(PROMPT) == [greedy(policy, PROMPT, NEW_TOKENS)]
    version = tmp_path / "version"
    write_model_folder(version, Link(str(tmp_path / "gone"), read_manifest(policy).digest), max_new_tokens=3)
    with pytest.raises(Exception, match="which is not on this machine; pass the folder"):
        mlflow.pyfunc.load_model(str(version))


def test_published_weights_are_downloaded_once_and_verified(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an address that MLflow opens; here that of its own artifacts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    client = MlflowClient()
    run = client.create_run(client.create_experiment("published", artifact_location=(tmp_path / "files").as_uri()))
    client.log_artifacts(run.info.run_id, str(policy), "model")
    address, digest = f"runs:/{run.info.run_id}/model", read_manifest(policy).digest
    write_model_folder(tmp_path / "version", Link(address, digest), max_new_tokens=NEW_TOKENS)
    for _ in range(2):
        model = mlflow.pyfunc.load_model(str(tmp_path / "version"))
        assert model.predict(PROMPT) == [greedy(policy, PROMPT, NEW_TOKENS)]
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
    change_weights(tmp_path / "cache" / "kfp-rlhf" / "models" / digest)
    with pytest.raises(Exception, match="has changed"):
        mlflow.pyfunc.load_model(str(tmp_path / "version"))
    write_model_folder(tmp_path / "other", Link(f"{address}s", "0" * 64), max_new_tokens=3)
    with pytest.raises(Exception, match=f"at {address}s cannot be downloaded"):
        mlflow.pyfunc.load_model(str(tmp_path / "other"))


def test_weights_published_to_an_s3_server_are_loaded_from_there(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version names the server (storage.endpoint_url); credentials come from the environment."""
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", "")  # restored after the test
    monkeypatch.delenv("MLFLOW_S3_ENDPOINT_URL")
    with LimitedS3() as server:
        storage = StorageConfig(publish_uri="s3://bucket/models", endpoint_url=server.url)
        upload_folder(open_store("s3://bucket/models", storage), policy, "r/ppo/model", last="manifest.json")
        source = Source("s3://bucket/models/r/ppo/model", endpoint_url=server.url)
        write_model_folder(tmp_path / "version", link_to(source, read_manifest(policy), example=""), max_new_tokens=3)
        model = mlflow.pyfunc.load_model(str(tmp_path / "version"))
    assert model.predict(PROMPT) == [greedy(policy, PROMPT, 3)]


def chat_policy(folder: Path) -> Path:
    make_tiny_model(folder, seed=3, num_layers=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>", "<assistant>"]})
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    write_manifest(folder, kind="policy_model")
    return folder


@pytest.mark.parametrize("is_chat", [False, True])
def test_model_of_chats_takes_a_prompt_as_a_message(tmp_path: Path, is_chat: bool) -> None:
    folder = chat_policy(tmp_path / "chat")
    rendered = "<user>Hello\n<assistant>"
    example = rendered if is_chat else PROMPT
    link = Link(str(folder), read_manifest(folder).digest, example=example)
    write_model_folder(tmp_path / "version", link, max_new_tokens=4)
    plain, whole = mlflow.pyfunc.load_model(str(tmp_path / "version")).predict(["Hello", rendered])
    assert whole == greedy(folder, rendered, 4)
    assert plain == (whole if is_chat else greedy(folder, "Hello", 4))


def test_example_is_the_shortest_prompt_and_the_limit_the_longest_response(tmp_path: Path) -> None:
    rows = [("a long prompt", 5), ("short", 9), ("middle one", 2)]
    file = tmp_path / "samples.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "ppo": {"num_tokens": n}}) + "\n" for p, n in rows))
    assert example_of(file) == ("short", 9)
    assert example_of(tmp_path / "none") == ("", 128)


@pytest.mark.slow
def test_champion_is_served_over_http(uri: str, tracking: TrackingConfig, policy: Path, tmp_path: Path) -> None:
    """By the command that MLflow documents."""
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "--env-manager", "local", "--port", "0"]
    port = free_port()
    command[-1] = str(port)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow looks for uvicorn there
    environment = os.environ | {
        "PATH": programs,
        "MLFLOW_TRACKING_URI": tracking.uri or "",
        "MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT": "60",
    }
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=output, stderr=output) as server,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/ping", server, log)
            answer = post(f"http://127.0.0.1:{port}/invocations", {"inputs": [PROMPT], "params": {"max_new_tokens": 5}})
        finally:
            server.terminate()
    assert answer == {"predictions": [greedy(policy, PROMPT, 5)]}


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for(url: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text(encoding="utf-8")
            time.sleep(0.5)


def post(url: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(content).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())
