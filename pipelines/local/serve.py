"""`kfp-rlhf serve`: the policy of a run behind vLLM's OpenAI-compatible server, on this machine or with KServe."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.rlhf.config.cluster import Images, Secrets
from components.rlhf.text.errors import InputError
from pipelines.local.export import policy_of
from pipelines.local.run_dir import find_run, read_params
from pipelines.local.web import page_when_ready, require_free_port

STORES = ("s3://", "gs://", "pvc://", "hf://", "https://")  # that KServe's storage initializer reads
PROMPT, ANSWER_TOKENS = "This", 16
ENVIRONMENT = {  # the space, in GiB, is for a CPU; on a GPU vLLM finds its own
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Served:
    location: str  # folder or URI
    name: str  # in requests


def what_to_serve(run: Path | None, uri: str | None, name: str | None) -> Served:
    """The model at a URI, or else the policy of a run: its published copy if there is one. Raises InputError if there is none."""
    if uri is not None:
        return Served(location=uri, name=name or uri.rstrip("/").rpartition("/")[2])
    folder = find_run(run)
    params, policy = read_params(folder), policy_of(folder)
    return Served(location=str(policy.resolve()), name=name or str(params["preset"]))


def server_command(served: Served, port: int, *, program: Sequence[str]) -> list[str]:
    """The command that starts vLLM's OpenAI-compatible server for a folder or a model of the Hub."""
    return [*program, served.location, "--served-model-name", served.name, "--host", "127.0.0.1", "--port", str(port)]


def shell_line(command: Sequence[str]) -> str:
    return shlex.join(command)


def serve(served: Served, port: int, *, check: bool, log: Callable[[str], None]) -> int:
    """Run the server until it ends, or with check until it has answered one prompt. Return its exit code, with check 0."""
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "serve needs vLLM, which is not installed; run pip install 'kfp-rlhf[cpu]', or 'kfp-rlhf[gpu]'."
        )
    if "://" in served.location:
        raise InputError(f"{served.location} is not a folder; download it first, or deploy it with --print kserve.")
    require_free_port(port)
    address = f"http://127.0.0.1:{port}"
    command = server_command(
        served, port, program=[sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    )
    if check:
        command.append("--enforce-eager")  # compiling takes longer than the answer
    process = subprocess.Popen(command, env=ENVIRONMENT | os.environ, stdout=sys.stderr)
    try:
        if not page_when_ready(process, f"{address}/health"):
            return process.wait() or 1
        if check:
            log(ask(address, served.name))
            return 0
        log(f"{served.name} answers at {address}/v1; press Ctrl-C to stop it.")
        return process.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def ask(address: str, name: str) -> str:
    """The text with which the server continues a prompt."""
    body = json.dumps({"model": name, "prompt": PROMPT, "max_tokens": ANSWER_TOKENS, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"{address}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return PROMPT + str(json.load(response)["choices"][0]["text"])
    except (OSError, ValueError, LookupError) as error:
        raise InputError(f"The server at {address} does not answer ({error}); its output above says why.") from None


def inference_service(served: Served) -> str:
    """An InferenceService (serving.kserve.io/v1beta1) whose Hugging Face runtime serves the model with vLLM.

    Raises InputError for a folder of this machine, which the cluster cannot read.
    """
    require_store(served, STORES)
    argument = json.dumps(f"--model_name={served.name}")
    return render("inference_service.yaml", served, argument=argument)


def vllm_deployment(served: Served) -> str:
    """A Deployment and a Service of vLLM's OpenAI-compatible server, which downloads a published model and verifies it first.

    Raises InputError for a model that is not in S3.
    """
    require_store(served, ("s3://",))
    return render(
        "vllm_deployment.yaml", served, name=json.dumps(served.name), image=Images().rollout, secret=Secrets().s3
    )


def require_store(served: Served, stores: Sequence[str]) -> None:
    if not served.location.startswith(tuple(stores)):
        kind = f"not in {' or '.join(stores)}" if "://" in served.location else "a folder of this machine"
        raise InputError(
            f"{served.location} is {kind}, which a cluster cannot read; run with storage.publish_uri, or copy it with kfp-rlhf export, and "
            "pass --uri."
        )


def render(template: str, served: Served, **values: object) -> str:
    """A template of this folder, with the location as uri and the name as a name of Kubernetes as resource."""
    from jinja2 import Environment

    name = re.sub(r"[^a-z0-9]+", "-", served.name.lower()).strip("-")[:50].strip("-")
    if not name[:1].isalpha():  # a Service begins with a letter
        name = f"policy-{name}".rstrip("-")
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    page = Environment(autoescape=False, keep_trailing_newline=True).from_string(text)
    return page.render(resource=name, uri=json.dumps(served.location), **values)
