"""What is redacted, in which encodings, and what is not."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.rlhf.config.storage import TrackingConfig
from components.rlhf.runtime.executor import write_executor_output, write_parameter
from components.rlhf.text.redaction import find_secrets, redact, redactor
from components.rlhf.tracking.mlflow import start_tracking
from tests.support.planted_secrets import PLANTED, files_with_secrets

ROOT = Path(__file__).resolve().parents[3]


class Changing(dict[str, str]):
    """An environment from which another thread removes a variable while it is read."""

    def __iter__(self) -> Iterator[str]:
        return iter([*super().__iter__(), "REMOVED"])

    def items(self) -> Any:
        return ((name, self[name]) for name in self)


def test_variable_that_vanishes_meanwhile_is_no_error() -> None:
    assert redactor(Changing(MY_TOKEN="PLANTED-12345"))("with PLANTED-12345") == "with ***"


@pytest.mark.parametrize("name", [name for name in PLANTED if name != "NO_PROXY"])
def test_secret_variables_are_redacted(name: str) -> None:
    hide = redactor({name: PLANTED[name]})
    assert "PLANTED" not in hide(f"could not use {PLANTED[name]!r} ({PLANTED[name]}); {json.dumps([PLANTED[name]])}")
    assert hide("ordinary text") == "ordinary text"


@pytest.mark.parametrize(
    "encoded",
    [
        "p%2Fss%20%22w%22ord%2B1",  # percent-encoded
        "p/ss%20%22w%22ord%2B1",  # percent-encoded as a path
        "p%2Fss+%22w%22ord%2B1",  # form-encoded
        'p/ss \\"w\\"ord+1',  # JSON
        "p/ss &quot;w&quot;ord+1",  # HTML
        "cC9zcyAidyJvcmQrMQ==",  # printf 'p/ss "w"ord+1' | base64
    ],
)
def test_encoded_secrets_are_redacted(encoded: str) -> None:
    assert redactor({"A_PASSWORD": 'p/ss "w"ord+1'})(f"<{encoded}>") == "<***>"


def test_webhook_url_and_its_path_are_redacted() -> None:
    hide = redactor({"RLHF_WEBHOOK_URL": "https://hooks.example.com/services/T00/B00/abc"})
    assert hide("POST https://hooks.example.com/services/T00/B00/abc failed") == "POST *** failed"
    assert hide("url: /services/T00/B00/abc (refused)") == "url: /*** (refused)"


def test_lines_of_a_private_key_are_redacted() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END PRIVATE KEY-----"
    assert redactor({"SIGNING_KEY": key})("line MIIEvQIBADANBg of it") == "line *** of it"


def test_password_of_a_url_variable_is_redacted() -> None:
    hide = redactor({"MLFLOW_TRACKING_URI": "https://someone:correcthorse@mlflow.example.com"})
    assert hide("user someone, password correcthorse") == "user someone, password ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@host/x and s3://b/k", "https://***@host/x and s3://b/k"),
        ("https://u:p@ss@host/x", "https://***@host/x"),
        ("GET /k?X-Amz-Credential=AK%2F1&X-Amz-Signature=00ff&part=2", "GET /k?X-Amz-Credential=AK%2F1&X-Amz-Signature=00ff&part=2"),
        ("https://b/k?X-Amz-Credential=A&X-Amz-Signature=0f&part=2", "https://b/k?X-Amz-Credential=***&X-Amz-Signature=***&part=2"),
        ("{'Authorization': 'Bearer abc.def'}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: Basic dTpw", "authorization: Basic ***"),
        ("token hf_abcdefghijklmnopqrstuvwxyzABCDEF01 it is", "token *** it is"),
        ("write to a@b.com or see https://b.com/a@b", "write to a@b.com or see https://b.com/a@b"),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("[ppo] iteration 3/8  score/mean 0.1234", "[ppo] iteration 3/8  score/mean 0.1234"),
    ],
)  # fmt: skip
def test_credentials_in_urls_and_headers_are_redacted(text: str, shown: str) -> None:
    assert redactor({})(text) == shown


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "short"),  # values of less than 8 characters may be ordinary words
        ("HF_TOKEN", ""),
        ("AWS_ACCESS_KEY_ID", "kfp-rlhf-user"),
        ("MLFLOW_TRACKING_USERNAME", "somebody-else"),
        ("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token"),
        ("TOKENIZERS_PARALLELISM", "false-false"),
        ("SSH_KEY", str(ROOT)),  # an existing path
        ("MONKEYS", "many monkeys"),
        ("HTTPS_PROXY", "http://proxy.example.com:3128"),
    ],
)
def test_other_variables_are_not_secrets(name: str, value: str) -> None:
    assert find_secrets({name: value}) == {}


def test_longer_of_two_secrets_with_common_prefix_is_redacted() -> None:
    hide = redactor({"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefghijkl"})
    assert hide("abcdefghijkl abcdefgh") == "*** ***"


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_all_output_of_a_process_is_redacted() -> None:
    code = """
import logging, os, sys, threading, warnings
from components.rlhf.text.redaction import redact_output
redact_output(); redact_output()
secret = os.environ["HF_TOKEN"]
logging.basicConfig()
import click
print("printed", secret)
click.echo(f"echoed {secret}")
print("on stderr", secret, file=sys.stderr)
logging.getLogger("library").warning("logged %s", secret)
warnings.warn(f"warned {secret}")
def fail(): raise ValueError(f"in a thread {secret}")
thread = threading.Thread(target=fail); thread.start(); thread.join()
raise ValueError(f"raised {secret}") from OSError(f"because of {secret}")
"""
    done = run_code(code, HF_TOKEN="PLANTEDPLANTED")
    assert done.returncode == 1
    assert done.stdout == "printed ***\nechoed ***\n"
    for prefix in ("on stderr", "logged", "warned", "in a thread", "raised", "because of"):
        assert f"{prefix} ***" in done.stderr, prefix
    assert "PLANTED" not in done.stderr


def test_password_of_tracking_uri_is_redacted_in_stage_output(tmp_path: Path) -> None:
    """A stage without the local runner, as in a pod."""
    command = [sys.executable, "-m", "components.import_model", "--model", str(tmp_path / "model")]
    command += ["--tokenizer", str(tmp_path / "tokenizer")]
    command += [
        "--settings",
        '{"kind":"base_model","source":"/nowhere/PLANTED-no-secret"}'.replace("PLANTED", "planted"),
    ]
    environment = {
        "MLFLOW_TRACKING_URI": "http://someone:PLANTEDpassword@127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "NO_PROXY": "*",
    }
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "MLflow could not be used" in done.stderr and "127.0.0.1" in done.stderr
    assert "PLANTED" not in done.stdout + done.stderr


def test_reports_to_kfp_and_mlflow_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED["HF_TOKEN"])
    model = {"artifacts": [{"name": "model", "uri": "s3://b/model"}]}
    executor_input = json.dumps(
        {"outputs": {"artifacts": {"model": model}, "outputFile": str(tmp_path / "output.json")}}
    )
    write_executor_output(executor_input, {"model": {"source": f"hub with {PLANTED['HF_TOKEN']}", "n": 1}})
    write_parameter(tmp_path / "reason", f"because of {PLANTED['HF_TOKEN']}")
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    start_tracking(tracking, run_id="run", stage="sft", params={"a": {"b": PLANTED["HF_TOKEN"]}, "c": 1}).finish(
        "FINISHED"
    )
    assert (tmp_path / "mlflow.db").stat().st_size > 100_000
    assert json.loads((tmp_path / "output.json").read_text())["artifacts"]["model"]["artifacts"][0]["metadata"] == {
        "source": "hub with ***",
        "n": 1,
    }
    assert (tmp_path / "reason").read_text() == "because of ***"
    assert files_with_secrets(tmp_path) == []


def test_redact_uses_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "abcdefgh1")
    assert redact("abcdefgh1 abcdefgh2") == "*** abcdefgh2"
